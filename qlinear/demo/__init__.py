"""The demo: a real language model in every scheme, measured and shown. See :mod:`qlinear.demo.run`."""
