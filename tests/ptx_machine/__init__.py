"""A small PTX machine in numpy: what a Triton kernel compiles to, executed instruction by instruction without a GPU.

``driver`` puts it under Triton, so that the project's own launchers run on it: ``with on_the_machine(90): ...``.
``parse`` reads the text. ``translate`` makes Python of what is elementwise, by the rules of ``integers``, ``floats``
and ``convert``, with the operations of ``arithmetic`` and ``bits`` on the ``kinds`` of numbers that registers hold.
``effects`` and ``warps`` have all other instructions, ``fragments`` and ``wgmma`` those of tensor cores. ``strand``
runs threads that go together, ``machine`` the programs of a launch. ``memory`` and ``shared`` say what is undefined:
bounds, alignment, bytes nobody wrote, copies that have not arrived, races between warps and between programs.
"""
