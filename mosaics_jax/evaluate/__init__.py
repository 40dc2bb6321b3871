"""Evaluation: suites of examples, a model that answers them, and what is written about it.

A suite (`perplexity`, `retrieval`, `needle`, `classification`, `harness`) knows its examples and how they are scored;
it sees a model through the small contract of `model.Model`, so that a scripted one can stand in for it.
"""
