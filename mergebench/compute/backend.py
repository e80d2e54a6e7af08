"""Which library decomposes matrices."""

from __future__ import annotations


def lapack() -> str:
    """Name, version and kernels of the LAPACK behind numpy, such as ``openblas 0.3.31 Haswell``."""
    from pathlib import Path

    import numpy as np
    from threadpoolctl import threadpool_info

    own = Path(np.__file__).parent
    found = [each for each in threadpool_info() if each.get("user_api") == "blas"]
    # scipy and torch may bring libraries of their own; numpy's lies beside it.
    found.sort(key=lambda each: not str(each.get("filepath", "")).startswith(str(own)))
    if not found:
        return str(np.show_config(mode="dicts")["Build Dependencies"]["lapack"]["name"])
    parts = (found[0].get(key) for key in ("internal_api", "version", "architecture"))
    return " ".join(str(part) for part in parts if part)
