"""A small PTX machine in numpy: what a Triton kernel compiles to, executed instruction by instruction without a GPU.

``parse`` reads the text. ``translate`` makes Python of what is elementwise, by the rules of ``integers``, ``floats``
and ``convert``, with the operations of ``arithmetic`` and ``bits`` on the ``kinds`` of numbers that registers hold.
"""
