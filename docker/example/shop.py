"""The application that compose.yml deploys: put yours in its place."""

from millstream import serve


@serve.deployment(autoscaling_config={"min_replicas": 1, "max_replicas": 3})
class Price:
    async def __call__(self, article: str) -> int:
        return len(article) * 100


@serve.deployment
class Shop:
    def __init__(self, price: serve.DeploymentHandle) -> None:
        self._price = price

    async def __call__(self, article: str) -> str:
        return f"{article}: {await self._price.call(article)}"


app = Shop.bind(Price.bind())
