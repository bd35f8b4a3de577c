"""Models that were exported, or compiled ahead of time, run in another process, which imports the
package for its operators."""

import subprocess
import sys

import pytest
import torch

from fused_attention import attention, scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(torch.nn.Module):
    """One layer of grouped-query attention and one of scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        self.query, self.keys = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, x, padding):
        q = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.keys(x).unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, causal=True, key_padding_mask=padding)
        out = out + scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


@pytest.fixture
def exported():
    """Returns the model, and its exported program for batches and lengths of any size."""
    model = Model().eval()
    B, S = torch.export.Dim("B", min=2, max=64), torch.export.Dim("S", min=2, max=1024)
    inputs = (torch.randn(3, 10, 32), torch.zeros(3, 10, dtype=torch.bool))
    shapes = ({0: B, 1: S}, {0: B, 1: S})
    with torch.no_grad():
        return model, torch.export.export(model, inputs, dynamic_shapes=shapes)


CHILD = """
import sys
import torch

package, results, load = sys.argv[1:]
loads = {
    "export": lambda: torch.export.load(package).module(),
    "aoti": lambda: torch._inductor.aoti_load_package(package),
}
cases = torch.load(results)
try:
    loads[load]()(*cases[0][0])
except Exception as error:
    print(type(error).__name__, error)
else:
    raise AssertionError("it ran without the package")
assert "fused_attention" not in sys.modules

import fused_attention

model = loads[load]()
for inputs, expected in cases:
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-6)
"""


def runs_in_another_process(model, package, directory, load):
    """Runs the package at several sizes; returns what it says without `import fused_attention`."""
    cases = []
    for B, S in ((3, 10), (2, 77), (5, 2)):
        inputs = (torch.randn(B, S, 32), torch.rand(B, S) > 0.8)
        with torch.no_grad():
            cases.append((inputs, model(*inputs)))
    torch.save(cases, directory / "results.pt")
    command = [sys.executable, "-c", CHILD, str(package), str(directory / "results.pt"), load]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_an_exported_program_runs_in_another_process(exported, tmp_path):
    model, program = exported
    torch.export.save(program, tmp_path / "model.pt2")
    error = runs_in_another_process(model, tmp_path / "model.pt2", tmp_path, "export")
    assert "attention_forward" in error


@pytest.mark.slow  # the C++ compiler takes half a minute
def test_a_package_of_aotinductor_runs_in_another_process(exported, tmp_path):
    model, program = exported
    path = str(tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch._inductor.aoti_compile_and_package(program, package_path=path) == path
    error = runs_in_another_process(model, path, tmp_path, "aoti")
    assert "attention_forward" in error
