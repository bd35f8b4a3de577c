"""python -m fused_attention bench: ours beside others, on one table of shapes.

shapes   the cases and their inputs     harness  interleaved measurement
peers    what is compared               bench    the measurement of a case and its table
"""
