"""Every test runs with 64-bit types off and on, and under strict dtype promotion.

Most of the time of the tests is compilation. Compiled programs are kept in pytest's cache, for all
workers and for the next run (`--cache-clear` removes them), but in memory only during one module,
or shorter if they take too much. Programs for several devices are not kept on disk. A program that
jaxlib 0.10 loads for CPUs has lost the order of its sums over the devices, and two devices that
compute the sums in different orders wait for each other for ever.
"""

import contextlib
import ctypes
import functools
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import compiler, core
from jax._src.interpreters import mlir
from jax._src.lax import lax
from jax.sharding import get_abstract_mesh
from threadpoolctl import threadpool_limits

from softjax._platforms import tracing_for

# Each worker has one core: other threads of OpenBLAS would wait in busy loops. A plugin of pytest
# may have imported NumPy, which reads the environment then, as the processes of the tests will.
threads = os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
threadpool_limits(int(threads), "blas")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_include_full_tracebacks_in_locations", False)  # nobody reads them
jax.config.update("jax_num_cpu_devices", 8)  # for test_parallel*.py; the others use the first

# Python looks for cycles of garbage at every 700 new objects, which is a tenth of the time of
# tracing: here at every 50,000, and never among the modules that are imported by now.
gc.freeze()
gc.set_threshold(50_000, 20, 10)


def pytest_configure(config: pytest.Config) -> None:
    # A directory in JAX_COMPILATION_CACHE_DIR is used instead; `-p no:cacheprovider` has none.
    if jax.config.jax_compilation_cache_dir is None and hasattr(config, "cache"):
        folder = config.cache.mkdir("compiled")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@functools.cache
def quick_options() -> dict[str, Any]:
    """The options of XLA:CPU that compile in a quarter of the time, if this jaxlib has them."""
    wanted = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    known = {}
    for name, value in wanted.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: (), compiler_options={name: value}).lower().compile()
            known[name] = value
    return known


@pytest.fixture(scope="session")
def quick_flags() -> str:
    """The quick options as XLA_FLAGS, for processes that a test starts."""
    flags = [f"--{name}={value}".lower() for name, value in quick_options().items()]
    return " ".join([os.environ.get("XLA_FLAGS", ""), *flags])


def is_compiled_quickly(node: pytest.Item | pytest.Collector) -> bool:
    """Whether the closest marker is `compiled_quickly`, and not `compiled_quickly(False)`."""
    marker = node.get_closest_marker("compiled_quickly")
    return marker is not None and all(marker.args)


class Compiler:
    """The compiler of JAX, with the options that users have or with quick ones.

    No option of JAX reaches all programs: eager operations have no `compiler_options`.
    """

    quickly = False
    options = staticmethod(compiler.get_compile_options)

    @classmethod
    def get_compile_options(cls, *args: Any, env_options_overrides: Any = None, **options: Any):
        overrides = env_options_overrides or {}
        overrides = overrides | quick_options() if cls.quickly else overrides
        return cls.options(*args, env_options_overrides=overrides, **options)

    @classmethod
    def set(cls, quickly: bool) -> None:
        if quickly != cls.quickly:
            quick_options()
            jax.clear_caches()
            cls.quickly = quickly


compiler.get_compile_options = Compiler.get_compile_options


@pytest.fixture
def full_compilation() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which a test compiles programs with the options that users have."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        quickly = Compiler.quickly
        Compiler.set(False)
        try:
            yield
        finally:
            Compiler.set(quickly)

    return context


@functools.cache
def context_of(thread: int, make: Callable[[], Any] = mlir.make_ir_context) -> Any:
    """The MLIR context of a thread, which its programs share until they are forgotten.

    JAX 0.10 loads the dialects into a context of its own for each program, which takes a third of
    the time of lowering; later versions have a context for each thread as well.
    """
    return make()


mlir.make_ir_context = lambda: context_of(threading.get_ident())


# Outside of `jax.jit`, JAX 0.10 compiles an identity for each shape of NumPy data that become an
# array, and a program for each shape of zeros, of ones and of an array that takes another shape: a
# fifth of the programs of the tests. NumPy needs none to arrange the same numbers.


def array_of(x: Any, compiled: Callable = core.stage_p.impl) -> jax.Array:
    """What `jnp.asarray(x)` is, without a program unless it has a place on a mesh."""
    is_plain = not isinstance(x, jax.Array) and get_abstract_mesh().empty
    return jax.device_put(x) if is_plain else compiled(x)


def broadcast(x: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    sizes = dict(zip(options["broadcast_dimensions"], x.shape, strict=True))
    unit = x.reshape([sizes.get(axis, 1) for axis in range(len(options["shape"]))])
    return np.broadcast_to(unit, options["shape"])


def reshaped(x: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    order = options["dimensions"]
    return (x if order is None else x.transpose(order)).reshape(options["new_sizes"])


def rearranged(numpy: Callable, compiled: Callable, x: Any, **options) -> jax.Array:
    """What an operation is that only arranges the numbers of `x` anew, by `numpy(x, options)`."""
    is_plain = isinstance(x, jax.Array) and isinstance(x.dtype, np.dtype) and not x.weak_type
    is_placed = options.get("sharding") is not None or not get_abstract_mesh().empty
    if not is_plain or is_placed or x.committed:
        return compiled(x, **options)
    return jax.device_put(np.array(numpy(np.asarray(x), options)))


def by_numpy(primitive: core.Primitive, numpy: Callable) -> None:
    primitive.def_impl(functools.partial(rearranged, numpy, primitive.impl))


core.stage_p.def_impl(array_of)
by_numpy(lax.broadcast_in_dim_p, broadcast)
by_numpy(lax.squeeze_p, lambda x, options: x.squeeze(options["dimensions"]))
by_numpy(lax.reshape_p, reshaped)
by_numpy(lax.transpose_p, lambda x, options: x.transpose(options["permutation"]))


def resident_bytes() -> int:
    """The memory of this process now, or 0 if the system does not report it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


class Memory:
    """Forgets compiled programs within a module, after a test that ends above `limit` bytes.

    The limit is 1.5 GB, or 0.4 GB more than what was left the last time, so that a worker which
    needs much memory for other reasons does not compile each program again for every test.
    """

    limit = 1.5e9

    @classmethod
    def is_short(cls) -> bool:
        return resident_bytes() > cls.limit

    @classmethod
    def forget_programs(cls) -> None:
        """Forgets all programs and returns their memory to the system: glibc keeps half of it."""
        jax.clear_caches()
        context_of.cache_clear()
        gc.collect()
        gc.freeze()  # what is left stays in use
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
            if trim is not None:
                trim(0)
        cls.limit = max(1.5e9, resident_bytes() + 0.4e9)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles a module's fixtures according to its marker, and forgets programs at its end."""
    Compiler.set(is_compiled_quickly(request.node))
    least_seconds = float("inf") if hasattr(request.module, "mesh_of") else 0
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    yield
    Memory.forget_programs()


@pytest.fixture(autouse=True)
def _forms_of_a_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Traces only the forms for a CPU, unless a test is marked `every_platform`.

    JAX traces and differentiates the forms for all platforms, and keeps one of them when it lowers
    a program: in all, a quarter more time.
    """
    every = request.node.get_closest_marker("every_platform") is not None
    with contextlib.nullcontext() if every else tracing_for("cpu"):
        yield


@pytest.fixture(autouse=True)
def _programs_of_a_test(request: pytest.FixtureRequest) -> Iterator[None]:
    Compiler.set(is_compiled_quickly(request.node))
    yield
    if Memory.is_short():
        Memory.forget_programs()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups the tests of a module by how they are compiled, since a change forgets all programs.

    Tests that are compiled like the module come first.
    """

    def place(item: pytest.Item) -> tuple[int, bool]:
        module = item.getparent(pytest.Module)
        assert module is not None
        first = order.setdefault(module.nodeid, len(order))
        return first, is_compiled_quickly(item) != is_compiled_quickly(module)

    order: dict[str, int] = {}
    items.sort(key=place)


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


@pytest.fixture
def compiled_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the compiled solver fit all data, as it does for large tables, and NumPy none."""
    from softjax.regression import _host_newton

    monkeypatch.setattr(_host_newton, "takes", lambda *_: False)


@pytest.fixture
def own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A folder of one's own, without pictures, which take longer than the rest."""
    monkeypatch.chdir(tmp_path)
    if "pictures" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def pictures() -> None:
    """Lets a test draw the picture of a fit, which takes longer than the rest of it."""
