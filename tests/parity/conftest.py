collect_ignore_glob = ["*.py"]  # the scenarios import flax, which the tests do not need
