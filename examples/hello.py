"""The smallest application: `python examples/hello.py`."""

from millstream import serve


@serve.deployment
class Hello:
    async def __call__(self, name: str) -> str:
        return f"hello {name}"


if __name__ == "__main__":
    handle = serve.run(Hello.bind())
    print(handle.call("Ada"))
