"""What the Ray Serve 2.0 - 2.6 page on handles shows, written as one would for Ray: only the two imports differ.

One script, as that page's code is: `Model` is defined again and again, and each `serve.run` replaces the application.
"""

# mypy: ignore-errors

import asyncio
import random

import millstream as ray
from millstream import serve

# 1: a synchronous handle


@serve.deployment
class Model:
    def __call__(self):
        return "hello"


handle = serve.run(Model.bind())
ref = handle.remote()
assert ray.get(ref) == "hello"
print("sync_handle", ray.get(ref))


# 2: asynchronous handles, chosen by request


@serve.deployment
class Model:
    def __call__(self):
        return "hello"


@serve.deployment
class Dispatcher:
    def __init__(self, handle_a, handle_b):
        self.handles = [handle_a, handle_b]

    async def __call__(self):
        handle = random.choice(self.handles)
        task = handle.remote()  # an asyncio.Task: sent, not matched yet
        assert isinstance(task, asyncio.Task)
        ref = await task
        return await ref


handle = serve.run(Dispatcher.bind(Model.bind(), Model.bind()))
ref = handle.remote()
assert ray.get(ref) == "hello"
print("async_handle", ray.get(ref))


# 3: the un-awaited task of one call as the argument of another


@serve.deployment
class Model:
    def __call__(self, text):
        return "hello " + text


@serve.deployment
class Chain:
    def __init__(self, handle_a, handle_b):
        self.handle_a, self.handle_b = handle_a, handle_b

    async def __call__(self, text):
        return await (await self.handle_b.remote(self.handle_a.remote(text)))


handle = serve.run(Chain.bind(Model.bind(), Model.bind()))
ref = handle.remote("Serve")
assert ray.get(ref) == "hello hello Serve"
print("async_handle_chain", ray.get(ref))


# 4: a method other than __call__


@serve.deployment
class Model:
    def __call__(self):
        return "called"

    def method1(self, arg):
        return f"method1({arg})"


handle = serve.run(Model.bind())
first, second = handle.remote(), handle.method1.remote("hi")
ready, not_ready = ray.wait([first, second], num_returns=2)
assert (len(ready), not_ready) == (2, [])
print("handle_method", ray.get([first, second]))

serve.shutdown()
