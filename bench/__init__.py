"""Measurements of r1kernels; the results that are committed stand under bench/results/<device>/.

Every command of ``python -m bench`` is a module of its name: beside this file the race of the ops (run, report, compare, guard)
and what writes README and docs (documents), in studies/ one question each, in gpu/ what a machine with a GPU is asked. A command
measures a record (JSON, results.py) and makes tables of it (table.py).

The race: ops/cases.py says which op at which shape, and its work; ops/logprob.py, divergence.py, grpo.py and moe.py make the
inputs of an op, its exact results in float64 (numerics.py) and everyone who computes it (peers.py); step.py is a whole step of
the trainer. measure.py checks them and times them in turns (turns.py, timing.py, memory.py, noise.py) beside the ceilings of the
machine (ceilings.py, environment.py); results.py keeps, report.py and pictures.py show. test_ops.py times the same by
pytest-benchmark.
"""
