"""One file a command.

Each has ``HELP`` (one line), ``EXAMPLES``, ``add(parser)`` and ``run(args) -> exit code``.  Importing one costs
nothing: PyTorch is imported inside ``run``, after the arguments were found good.
"""
