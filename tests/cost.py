"""The cost of the test modules: `python -m pytest -n 2 -p tests.cost`.

A table at the end shows how much CPU time each module took, how many programs it compiled or read
from the cache, and the peak memory of its worker so far. The CPU time includes subprocesses, but
not the forked workers of test_processes.py.
"""

import collections
import resource
from collections.abc import Iterator
from typing import Any

import jax.monitoring
import pytest

COMPILATION = "/jax/core/compile/backend_compile_duration"


class Costs:
    """The CPU seconds, compiled programs and peak memory of each module."""

    def __init__(self) -> None:
        self.before, self.programs = seconds(), 0
        self.modules: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0, 0.0])
        jax.monitoring.register_event_duration_secs_listener(self.count)

    def count(self, event: str, duration: float, **_: Any) -> None:
        self.programs += event == COMPILATION

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report = yield
        before, self.before = self.before, seconds()
        report.user_properties.append(("cost", [self.before - before, self.programs, gigabytes()]))
        self.programs = 0
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # This runs in the main process, with the reports of all workers.
        module = self.modules[report.nodeid.partition("::")[0]]
        for name, value in report.user_properties:
            if name == "cost":
                cpu, programs, memory = value
                module[:] = module[0] + cpu, module[1] + programs, max(module[2], memory)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        line = terminalreporter.write_line
        line(f"{'CPU s':>8} {'programs':>9} {'GB':>5}  module")
        for name, (cpu, programs, memory) in sorted(self.modules.items(), key=lambda m: -m[1][0]):
            line(f"{cpu:8.1f} {programs:9.0f} {memory:5.2f}  {name}")
        total = sum(cost[0] for cost in self.modules.values())
        line(f"{total:8.1f} CPU s in all, {total / 120:.1f} minutes of two cores")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Costs())


def seconds() -> float:
    """The CPU time of this process and of the child processes that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def gigabytes() -> float:
    """The peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
