"""What the benchmarks ``bench_op.py``, ``bench_module.py`` and ``bench_model.py`` and ``gpu_check.py`` are made of."""
