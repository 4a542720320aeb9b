"""The build of DeepSpeed's operators: locks that killed builds leave behind, and locks of builds that go on."""

import os
import subprocess
import sys
import time

from megaprompt.distributed import operators


def test_a_lock_left_by_a_killed_build_is_removed(tmp_path, caplog):
    build = tmp_path / "py3" / "async_io"
    build.mkdir(parents=True)
    (build / "lock").touch()
    long_ago = time.time() - 10 * operators._STALE_SECONDS
    os.utime(build / "lock", (long_ago, long_ago))
    operators._wait_for_other_builds(tmp_path, "async_io")
    assert not (build / "lock").exists()
    assert "the build that it belongs to was killed" in caplog.text


def test_a_lock_of_a_living_build_is_waited_for(tmp_path):
    build = tmp_path / "py3" / "async_io"
    build.mkdir(parents=True)
    (build / "lock").touch()
    long_ago = time.time() - 10 * operators._STALE_SECONDS
    os.utime(build / "lock", (long_ago, long_ago))
    compiler = subprocess.Popen(
        [sys.executable, "-c", "import os, time; time.sleep(1.5); os.remove('lock')"], cwd=build
    )
    start = time.monotonic()
    operators._wait_for_other_builds(tmp_path, "async_io")
    assert compiler.wait() == 0  # it found its lock
    assert time.monotonic() - start > 0.5
    assert build.exists()
