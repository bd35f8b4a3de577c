"""Tests record_calls, and python -m fused_attention record: what served which call, and why."""

import gc
import importlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as bound_before
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attention import attention, explain, masked_softmax, patch_sdpa, record_calls
from fused_attention.call import backends, record
from fused_attention.call.explain import details_of
from fused_attention.kernels.tiles import ARCHS
from fused_attention.operators import arguments
from fused_attention.operators._torch import fake_tensors, len_torch_dispatch_stack

HERE = os.path.abspath(__file__)


@pytest.fixture(autouse=True)
def no_mode_is_left():
    yield
    assert len_torch_dispatch_stack() == 0


def qkv(*shape, **options):
    return [torch.randn(shape or (2, 4, 9, 16), **options) for _ in range(3)]


def line():
    return sys._getframe(1).f_lineno


def only(calls):
    (row,) = calls.rows
    return row


def by_backend(calls):
    return [row.served.backend for row in calls.rows]


# -- What a row says ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, options",
    [
        ((2, 4, 100, 64), {"causal": "top_left"}),
        ((1, 2, 40, 16), {"mask": torch.ones(40, 40, dtype=torch.bool), "softcap": 3.0}),
        ((1, 2, 40, 16), {"bias": torch.randn(40, 40), "window_size": (7, 0), "return_lse": True}),
        ((1, 8, 1, 64), {"scale": 0.5}),
    ],
)
def test_a_row_says_what_explain_says(sizes, options, isa):
    tensors = qkv(*sizes)
    expected = explain(*tensors, **options)
    with record_calls() as calls:
        attention(*tensors, **options)
        attention(*tensors, **options)
    rows = {row.served.site.line: row for row in calls.rows}
    assert len(rows) == 2
    for row in rows.values():
        details = row.served.details
        assert row.calls == 1 and row.nanoseconds > 0
        assert row.served.backend == expected.backend == "cpu" and not row.served.why
        assert details.kernel == expected.details.kernel and details.isa == isa
        assert (details.block_m, details.block_n, details.reason) == (
            expected.details.block_m,
            expected.details.block_n,
            expected.details.reason,
        )
    said = only_options(options)
    assert row.served.options == said
    assert row.served.tensors["query"] == (sizes, "float32")
    for name in options.keys() & {"mask", "bias"}:
        assert row.served.tensors[name][0] == (1, 1, 40, 40)


def only_options(options):
    kept = {"causal", "softcap", "scale", "window_size"}
    said = {name: x for name, x in options.items() if name in kept}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in said.items()}


def test_extra_memory_is_that_of_explain():
    tensors = qkv(2, 4, 100, 64)
    with record_calls() as calls:
        attention(*tensors)
    assert only(calls).served.details.extra_bytes == explain(*tensors).details.extra_bytes > 0


def test_call_sites_and_counts():
    tensors = qkv()
    with record_calls() as calls:
        for _ in range(3):
            attention(*tensors)
        here = line() - 1
        attention(*tensors)
        torch.vmap(lambda q: attention(q, q, q))(torch.randn(3, 1, 2, 5, 8))
    first, second, third = calls.rows
    assert (first.served.site.file, first.served.site.line, first.calls) == (HERE, here, 3)
    assert (second.served.site.line, second.calls) == (here + 2, 1)
    assert third.served.site.line == here + 3
    assert {row.served.site.module for row in calls.rows} == {""}


class Attend(nn.Module):
    def forward(self, x):
        return attention(x, x, x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attend": Attend()}) for _ in range(3))
        self.last = nn.Sequential(Attend())

    def forward(self, x):
        for layer in self.layers:
            x = layer["attend"](x)
        return self.last(x)


def test_modules():
    with record_calls() as calls:
        Model()(qkv()[0])
        Attend()(qkv()[0])
    layers, last, alone = calls.rows
    assert layers.served.site.module == "Model.layers.*.attend" and layers.calls == 3
    assert last.served.site.module == "Model.last.*" and last.calls == 1
    assert alone.served.site.module == "Attend"
    assert {row.served.site.line for row in calls.rows} == {
        Attend.forward.__code__.co_firstlineno + 1
    }


def test_the_backward():
    q, k, v = qkv(requires_grad=True)
    with record_calls() as calls:
        out = attention(q, k, v, causal=True)
        out.sum().backward()
        here = line() - 1
    forward, backward = calls.rows
    assert forward.served.operator.startswith("attention_forward")
    assert backward.served.operator == "attention_backward"
    assert backward.served.site.line == here and backward.served.options == {"causal": "top_left"}
    assert backward.served.details.kernel == "attention_backward"
    assert backward.nanoseconds > 0


def test_softmax_and_copies():
    q, k, v = qkv(2, 4, 9, 16)
    with record_calls() as calls:
        masked_softmax(q)
        attention(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)
    softmax, copied = calls.rows
    assert softmax.served.details.kernel == "masked_softmax_forward"
    assert softmax.served.backend == "cpu"
    assert any("a copy of key" in why for why in copied.served.why)


def test_reasons_on_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    importlib.import_module("fused_attention.kernels.operators")  # binds the true arch_of first
    monkeypatch.setattr("fused_attention.kernels.tiles.arch_of", lambda device: ARCHS["sm_90"])
    site = record.Site("model.py", 1, "")
    plain = torch.ops.fused_attention.attention_forward_plain.default
    with fake_tensors():  # stand for those on a GPU
        q = torch.empty(1, 8, 512, 64, dtype=torch.bfloat16, device="cuda")
        served = record._served_here(site, plain, (q, q, q, 0.125, 1, -1, -1, 0), {}, [])
        problem = record._problem_of(arguments(plain, (q, q, q, 0.125, 1, -1, -1, 0), {}))
        expected = details_of(backends.TRITON, *problem)
    assert problem[0].numbers.causal == 1 and not problem[0].differentiable
    assert served.backend == "triton" and not served.is_timed
    assert served.why == (f"not cuda: {backends.CUDA.missing()}",)
    assert served.details == expected and expected.kernel == "attention_forward"
    with record_calls() as calls:
        calls.add(served, 0)
    assert calls.rows[0].as_json()["total_ms"] is None
    assert calls.table().splitlines()[2].split()[2:4] == ["–", "–"]


# -- What is not served here -------------------------------------------------------------


def test_the_reference_and_its_reason():
    q, k, v = qkv(1, 2, 5, 576)
    with record_calls() as calls:
        attention(q, k, v)
        attention(*qkv(), backend="reference")
        with torch.no_grad():
            torch.func.grad(lambda q: attention(q, q, q, backend="reference").sum())(qkv()[0])
    wide, asked, transformed = calls.rows
    assert by_backend(calls) == ["reference"] * 3
    assert wide.served.tensors["query"] == ((1, 2, 5, 576), "float32")
    (why,) = wide.served.why
    assert why == f"not cpu: {'; '.join(explain(q, k, v).refused['cpu'])}" and "576" in why
    assert "by name" in asked.served.why[0]
    assert transformed.served.tensors["query"] == ((2, 4, 9, 16), "float32")


def test_pytorchs_sdpa_without_a_patch():
    with record_calls() as calls:
        F.scaled_dot_product_attention(*qkv(), is_causal=True)
        F.scaled_dot_product_attention(*qkv(), dropout_p=0.5)
        F.scaled_dot_product_attention(*qkv(1, 2, 5, 576))
    fused, unfused, wide = calls.rows
    assert by_backend(calls) == ["pytorch"] * 3
    assert fused.served.details.kernel == "flash_attention_for_cpu"
    assert fused.served.options == {"is_causal": True}
    assert "patch_sdpa() would send it to the backend cpu" in fused.served.why[0]
    assert unfused.served.details.kernel == "bmm + _safe_softmax + bmm"
    assert "patch_sdpa() would send it to the backend cpu" in unfused.served.why[0]
    assert unfused.served.details.extra_bytes == 2 * 4 * 9 * 9 * 4
    assert wide.served.why[0].startswith("not cpu: query's head_dim 576")


def test_pytorchs_sdpa_with_a_patch():
    with patch_sdpa(), record_calls() as calls:
        F.scaled_dot_product_attention(*qkv(), dropout_p=0.5)
        bound_before(*qkv())
        F.scaled_dot_product_attention(*qkv(1, 2, 5, 576))
    function, operator, left = calls.rows
    assert by_backend(calls) == ["cpu", "cpu", "pytorch"]
    assert function.served.options == {"dropout_p": 0.5}
    assert operator.served.operator == "_scaled_dot_product_flash_attention_for_cpu"
    assert operator.served.details.kernel == explain(*qkv()).details.kernel
    assert "576" in left.served.why[0]


def heads_in_batch(q, k, v):
    return torch.baddbmm(torch.zeros(1), q, k.mT).softmax(-1) @ v


WRITTEN_OUT = {
    "matmul": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "scale, mask": lambda q, k, v: (
        (q @ k.mT * 0.25).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -1e9).softmax(-1)
        @ v
    ),
    "additive mask, dropout": lambda q, k, v: (
        F.dropout(torch.softmax(q @ k.mT / 4 + torch.zeros(9, 9), dim=-1), 0.1) @ v
    ),
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v
    ),
    "half": lambda q, k, v: (
        F.softmax(q.half() @ k.half().mT, dim=-1, dtype=torch.float32).half() @ v.half()
    ),
    "in place": lambda q, k, v: (q @ k.mT).mul_(0.25).add_(1.0).softmax(-1) @ v,
    "baddbmm": lambda q, k, v: heads_in_batch(*(x.flatten(0, 1) for x in (q, k, v))),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_attention_that_is_written_out(name, requires_grad):
    q, k, v = qkv(requires_grad=requires_grad)
    with record_calls() as calls:
        out = WRITTEN_OUT[name](q, k, v)
        if requires_grad:
            out.sum().backward()
    row = only(calls)
    assert (row.calls, row.served.backend) == (1, "pytorch")
    assert row.served.operator == "written out"
    assert row.served.tensors["query"][0] in ((2, 4, 9, 16), (8, 9, 16))
    assert row.served.site.file == HERE and row.nanoseconds > 0
    assert "attention() would run it on the backend cpu" in row.served.why[0]


def test_inference_mode():
    q, k, v = qkv()
    with torch.inference_mode(), record_calls() as calls:
        expected = (q @ k.mT).softmax(-1) @ v
        for name in WRITTEN_OUT:
            WRITTEN_OUT[name](q, k, v)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        attention(q, k, v)
    torch.testing.assert_close(out, expected)
    assert by_backend(calls) == ["pytorch"] * (len(WRITTEN_OUT) + 3) + ["cpu"]
    assert {row.served.operator for row in calls.rows[: len(WRITTEN_OUT) + 1]} == {"written out"}
    kernels = [row.served.details.kernel for row in calls.rows[-3:-1]]
    assert kernels == ["flash_attention_for_cpu", "bmm + _safe_softmax + bmm"]


def test_what_is_no_attention():
    x, weight = torch.randn(2, 9, 16), nn.Parameter(torch.randn(2, 16, 9))
    with record_calls() as calls:
        nn.Linear(16, 9)(x).softmax(-1) @ x  # a product with parameters
        (x @ weight).softmax(-1) @ x
        (x @ x.mT) @ x  # no softmax
        (x @ x.mT).softmax(-2) @ x  # over the queries
        (x @ x.mT).softmax(-1).sum()  # weights that no value is multiplied with
        x.softmax(-1) @ x.mT
        (x @ x.mT).relu() @ x
    assert calls.rows == [] and calls.table() == "No attention was called."


def test_without_what_was_missed():
    with record_calls() as everything, record_calls(missed=False) as ours:
        F.scaled_dot_product_attention(*qkv())
        WRITTEN_OUT["matmul"](*qkv())
        attention(*qkv())
    assert by_backend(everything) == ["pytorch", "pytorch", "cpu"]
    assert by_backend(ours) == ["cpu"]
    with record_calls(missed=False) as ours:
        F.scaled_dot_product_attention(*qkv())
        WRITTEN_OUT["matmul"](*qkv())
    assert ours.rows == []
    with patch_sdpa(), record_calls(missed=False) as ours:
        bound_before(*qkv())
    assert by_backend(ours) == ["cpu"]


def test_the_native_path_of_torch():
    layer = nn.TransformerEncoderLayer(32, 2, 16, batch_first=True).eval()
    with torch.no_grad(), record_calls() as calls:
        layer(torch.randn(2, 9, 32))
    row = only(calls)
    assert row.served.operator == "_transformer_encoder_layer_fwd"
    assert list(row.served.tensors) == ["src"]
    assert "patch_sdpa() would send it to the backend cpu" in row.served.why[0]
    with patch_sdpa(), torch.no_grad(), record_calls() as calls:
        layer(torch.randn(2, 9, 32))
    assert by_backend(calls) == ["cpu"]
    assert only(calls).served.site.module == "TransformerEncoderLayer.self_attn"


# -- The table ---------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_fits(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    q, k, v = qkv(2, 4, 300, 64)
    mask = torch.ones(300, 300, dtype=torch.bool)
    details = explain(q, k, v, mask=mask, softcap=5.0, window_size=(7, 0)).details
    tiles = f"{details.block_m} queries x {details.block_n} keys"
    with record_calls() as calls:
        Model()(qkv()[0])
        attention(*qkv(1, 2, 5, 576))
        attention(q, k, v, mask=mask, softcap=5.0, window_size=(7, 0))
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        F.scaled_dot_product_attention(q, k, v)
    text = calls.table()
    assert max(map(len, text.splitlines())) <= columns
    assert str(calls) == text == calls.table(columns)
    flat = " ".join(text.split())
    for word in (
        *("call site", "calls", "backend", "kernel", "Model.layers.*.attend"),
        *("query 2x4x300x64", "mask 1x1x300x300 bool", "softcap=5.0", "extra memory"),
        *("window_size=[7, 0]", "kernel attention_forward, ", f"tiles of {tiles}"),
        "not cpu: query's head_dim 576: only 1 to 512",
        "8 calls, 3 of them by no kernel of this package",
    ):
        assert word in flat, word
    assert "test_record_calls.py:" in text or columns == 60


def test_growing_keys_share_a_line():
    q, k, v = qkv(1, 2, 80, 64)
    with record_calls() as calls:
        for n in range(70, 73):
            attention(q[:, :, :1], k[:, :, :n], v[:, :, :n])
    assert len(calls.rows) == 3 and [row.calls for row in calls.rows] == [1, 1, 1]
    lines = calls.table(100).splitlines()
    assert lines[2].split()[1] == "3"
    assert "query 1x2x1x64, key 1x2x(70-72)x64, value 1x2x(70-72)x64" in calls.table(100)
    assert lines[-1].startswith("3 calls, 0 ")


def test_json():
    q, k, v = qkv(requires_grad=True)
    with record_calls() as calls:
        Model()(q.detach())
        attention(q, k, v, window_size=(3, 0), bias=torch.randn(9, 9)).sum().backward()
        F.scaled_dot_product_attention(*qkv())
    document = json.loads(calls.to_json())
    assert document["rows"] == [row.as_json() for row in calls.rows]
    first = document["rows"][0]
    assert first["file"] == HERE and first["module"] == "Model.layers.*.attend"
    assert first["shapes"]["query"] == [2, 4, 9, 16] and first["dtypes"]["query"] == "float32"
    assert first["calls"] == 3 and first["total_ms"] > 0
    assert first["mean_us"] == pytest.approx(first["total_ms"] * 1e3 / 3)
    options = [row["options"] for row in document["rows"]]
    assert options == [{}, {}, {"window_size": [3, 0]}, {"window_size": [3, 0]}, {}]


# -- Blocks, threads, lifetimes ----------------------------------------------------------


def test_blocks_nest():
    with record_calls() as outer:
        attention(*qkv())
        with record_calls() as inner:
            attention(*qkv())
            assert inner.rows[0].calls == 1  # may be read inside
        attention(*qkv())
    attention(*qkv())
    assert sum(row.calls for row in outer.rows) == 3 and sum(r.calls for r in inner.rows) == 1
    with pytest.raises(RuntimeError, match="being taken"), outer, outer:
        pass
    with outer:  # once more
        attention(*qkv())
    assert sum(row.calls for row in outer.rows) == 4


def test_an_exception_passes():
    with pytest.raises(KeyError), record_calls() as calls:
        attention(*qkv())
        raise KeyError
    assert only(calls).calls == 1
    with pytest.raises(ValueError, match="head_dim"), record_calls() as calls:
        attention(qkv()[0], *qkv(2, 4, 9, 8)[:2])
    assert calls.rows == []


class Other(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def recording(calls):
    with calls:
        attention(*qkv())
        yield
        attention(*qkv())


def test_generators_end_in_any_order():
    first, second = record_calls(), record_calls()
    one, two = recording(first), recording(second)
    next(one), next(two)
    attention(*qkv())
    assert next(one, None) is None
    attention(*qkv())
    assert next(two, None) is None
    assert sum(row.calls for row in first.rows) == 4  # its own two, one of `two`, one above
    assert sum(row.calls for row in second.rows) == 5  # its own two, one of `one`, two above
    third = record_calls()
    three = recording(third)
    next(three)
    with Other():  # entered later, left later
        assert next(three, None) is None
        assert len_torch_dispatch_stack() == 1
        attention(*qkv())
    assert sum(row.calls for row in third.rows) == 2


def test_threads_record_their_own():
    records = []

    def work(number):
        with record_calls() as calls:
            for _ in range(number):
                attention(*qkv())
        records.append((number, sum(row.calls for row in calls.rows)))

    with record_calls() as calls:
        threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(records) == [(1, 1), (2, 2), (3, 3)] and calls.rows == []


def test_no_tensor_is_kept():
    q, k, v = qkv(requires_grad=True)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    tensors = [weakref.ref(x) for x in (q, k, v, mask)]
    with record_calls() as calls:
        attention(q, k, v, mask=mask, dropout_p=0.1).sum().backward()
        WRITTEN_OUT["scale, mask"](q, k, v).sum().backward()
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attention(q, k, v, backend="reference")
        del q, k, v, mask
        gc.collect()
        assert [x() for x in tensors] == [None] * 4
    assert len(calls.rows) == 5


def test_results_stay_the_same():
    q, k, v = qkv(dtype=torch.float64, requires_grad=True)

    def results():
        torch.manual_seed(1)
        out = attention(q, k, v, causal=True, dropout_p=0.3)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        mapped = torch.vmap(lambda x: attention(x, x, x))(torch.stack([q, k]))
        slope = torch.func.grad(lambda x: attention(x, k, v).sum())(q)
        return [out, *grads, mapped, slope]

    expected = results()
    with record_calls() as calls:
        got = results()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert sum(row.calls for row in calls.rows) == 5  # three forwards, two backwards


def test_fake_and_meta_tensors_are_no_calls():
    with record_calls() as calls:
        with fake_tensors():
            attention(*qkv())
            attention(*qkv(1, 2, 5, 576))
        attention(*qkv(device="meta"))
        explain(*qkv())
    assert calls.rows == []


@pytest.mark.slow
def test_compiled_code_stays_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend)
    def layer(q, k, v):
        return attention(q.sin(), k, v, causal=True)

    with record_calls() as calls:
        layer(*qkv())
        layer(*qkv())
    assert len(graphs) == 1
    assert only(calls).calls == 2 and only(calls).served.backend == "cpu"


# -- What a patch did --------------------------------------------------------------------


def test_the_report_of_a_patch(monkeypatch, request):
    monkeypatch.setenv("COLUMNS", "80")
    patch = patch_sdpa()
    request.addfinalizer(patch.undo)
    assert repr(patch) == (
        "<Handle patch_sdpa, active, 0 calls: 0 served here, 0 left to the original>"
    )
    for length in (3, 4, 5):
        F.scaled_dot_product_attention(*qkv(1, 4, length, 16), is_causal=True)
    F.scaled_dot_product_attention(*qkv(1, 2, 5, 576))
    F.scaled_dot_product_attention(*qkv(1, 2, 6, 576))
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(*qkv(), attn_mask=torch.ones(9, 9, dtype=torch.int32))
    bound_before(*qkv())
    text = patch.report()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "6 calls: 3 served here, 3 left to the original"
    assert lines[3].split() == "2 x 576 2 x 576 2 x 576 float32 2".split()
    flat = " ".join(text.split())
    assert "not cpu: query's head_dim 576: only 1 to 512" in flat
    assert "attn_mask: expected dtype torch.bool or torch.float32, got torch.int32" in flat
    assert lines[-1].startswith("1 calls of the native function")
    patch.undo()
    F.scaled_dot_product_attention(*qkv())
    assert patch.report() == text and repr(patch).startswith("<Handle patch_sdpa, undone, 6 calls")
    with patch_sdpa() as another:
        assert another.report().startswith("0 calls")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_every_call_of_a_patch_is_counted():
    strided = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 4, 8)])
    with patch_sdpa() as patch:
        F.scaled_dot_product_attention(strided, strided, strided)
        with pytest.raises((TypeError, AttributeError)):
            F.scaled_dot_product_attention(None, None, None)
        q = torch.randn(5, 8)
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        threads = [
            threading.Thread(
                target=lambda: [F.scaled_dot_product_attention(q, q, q) for _ in range(200)]
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert patch.report().startswith("803 calls: 801 served here, 2 left")
    assert "others" in patch.report()


# -- The command -------------------------------------------------------------------------

SCRIPT = """
    import sys
    import torch
    import helper_beside_the_script
    from fused_attention import attention

    print("arguments", sys.argv[1:], __name__)
    q = torch.randn(1, 2, 5, 8)
    attention(q, q, q)
    {end}
"""


def run(folder, end, *arguments):
    (folder / "helper_beside_the_script.py").touch()
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("{end}", end))
    command = [sys.executable, "-m", "fused_attention", "record", *arguments[:-1], str(script)]
    return subprocess.run(
        [*command, *arguments[-1]],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"},
    )


def test_the_command(tmp_path):
    report = tmp_path / "report.json"
    result = run(tmp_path, "", "--json", str(report), ["--json", "x", "-k"])
    assert result.returncode == 0, result.stderr
    assert "arguments ['--json', 'x', '-k'] __main__" in result.stdout
    assert "script.py:9" in result.stdout and "1 calls, 0 of them" in result.stdout
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["line"], row["backend"]) == (9, "cpu")
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    "end, code, error",
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit('bad input')", 1, "bad input\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_the_exit_status_is_the_scripts(tmp_path, end, code, error, capsys, monkeypatch):
    from fused_attention.tools import cli

    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, fused_attention\n"
        f"q = torch.randn(1, 2, 5, 8)\nfused_attention.attention(q, q, q)\n{end}\n"
    )
    argv, path = sys.argv, sys.path
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["record", str(script)]) == code
    assert sys.argv is argv and sys.path is path
    printed = capsys.readouterr()
    assert "script.py:3" in printed.out and "1 calls" in printed.out
    assert error in printed.err and "runpy" not in printed.err


def test_wrong_commands(capsys, tmp_path):
    from fused_attention.tools import cli

    for words in (["record"], ["record", str(tmp_path / "none.py")]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2
    assert "expected a file that exists" in capsys.readouterr().err
