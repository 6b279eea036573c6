"""The Worker's entry: every request goes to the router that stands beside this file as llm_router.py."""

from workers import WorkerEntrypoint

from llm_router import WorkerRouter

ROUTER = WorkerRouter()  # it lives as long as the isolate, and with it what it knows of its providers' health


class Default(WorkerEntrypoint):
    async def fetch(self, request):
        return await ROUTER.fetch(request, self.env, self.ctx)
