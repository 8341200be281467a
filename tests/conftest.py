"""Every test runs with 64-bit types off and on, and under strict dtype promotion.

Most of the time of the tests is compilation. The programs are kept in the cache of pytest, for the
workers and for the next run (`--cache-clear` removes them), and in memory only during one module.
"""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # for test_parallel*.py; the others use the first


def pytest_configure(config: pytest.Config) -> None:
    # A directory in JAX_COMPILATION_CACHE_DIR is used instead; `-p no:cacheprovider` has none.
    if jax.config.jax_compilation_cache_dir is None and hasattr(config, "cache"):
        folder = config.cache.mkdir("compiled")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module", autouse=True)
def compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """The options of the compiler for the tests of a module, whose programs are then forgotten."""
    quickly = request.node.get_closest_marker("compiled_quickly") is not None
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # `x64_once` runs the test once, with 64-bit types off; `x64_once(True)`, with them on.
    once = metafunc.definition.get_closest_marker("x64_once")
    settings = [False, True] if once is None else [bool(once.args and once.args[0])]
    names = ["x64" if setting else "x32" for setting in settings]
    metafunc.parametrize("x64", settings, ids=names, indirect=True)


@pytest.fixture(autouse=True)
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether 64-bit types are on."""
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def dtype(x64: bool) -> str:
    """The widest floating dtype of the setting."""
    return "float64" if x64 else "float32"
