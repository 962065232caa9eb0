"""Scripts for small processes: what merging costs without arithmetic, and what a command took."""

from __future__ import annotations

FLOOR = """
import json, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 1 << 19  # bytes: as many numbers of two bytes as are fused at once
out, models = Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]]
begin, jobs, opened, local = time.perf_counter(), [], [], threading.local()
for shard in sorted(file.name for file in models[0].glob("*.safetensors")):
    files = [os.open(model / shard, os.O_RDONLY) for model in models]
    size = os.fstat(files[0]).st_size
    target = os.open(out / shard, os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(target, 0, size)
    opened.append(target)
    jobs += [(files, target, at, min(BLOCK, size - at)) for at in range(0, size, BLOCK)]

def move(job):
    files, target, at, size = job
    if not hasattr(local, "buffer"):
        local.buffer = memoryview(bytearray(BLOCK))
    for file in files:
        os.preadv(file, [local.buffer[:size]], at)
    os.pwrite(target, local.buffer[:size], at)

with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    list(pool.map(move, jobs))
done = time.perf_counter()
for target in opened:
    os.fsync(target)
print(json.dumps({"seconds": done - begin, "sync_seconds": time.perf_counter() - done}))
"""
"""A script: folder of the result, folders of models. Prints the seconds of both parts."""

WATCH = """
import json, resource, subprocess, sys, time
begin = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=sys.stderr)
seconds, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": seconds, "memory": used.ru_maxrss * 1024}))
sys.exit(done.returncode)
"""
"""A script: a command. What it prints goes to stderr. A process counts as its own what the one had
that it was forked from, so that one is small."""
