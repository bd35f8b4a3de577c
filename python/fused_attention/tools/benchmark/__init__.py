"""python -m fused_attention bench: our kernels beside others, on tables of cases.

shapes       the cases of attention        workloads  softmax, training, models, frontend
peers        what is compared              suites     the tables by name
trial        one case, ready to measure    harness    interleaved measurement, intervals
bench        measures the cases            report     tables, Markdown, JSON, HTML, PNG
compare      one report beside another
"""
