"""The table on a GPU, in under eight minutes, with nothing but torch installed: ``python benchmarks/cuda.py``.

NOTE [Name]. torch imports the package ``cuda`` if there is one, and finds this file in its place whenever a script of
this folder runs. So nothing is imported here until it is run; ``gpu.py`` has the measurements.
"""

if __name__ == "__main__":
    from gpu import main

    main()
