"""L4: the roles beside workers: the scheduler hands out work, servers hold parameters.

Both are state machines without input or output: what comes in is a message and the time, what goes
out are messages. `link/post` carries them between processes, tests carry them as they like.
"""
