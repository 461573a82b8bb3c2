"""Celery, prefork, two nodes of four processes; late acknowledgement as its guide to Redis and to tasks has it."""

import time

from celery import Celery

from benchmarks.faults.ledger import TIMEOUT_S, URL, note, send_all

app = Celery("faults", broker=URL)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"visibility_timeout": TIMEOUT_S},
)


def work(name: str, seconds: float) -> None:
    note("start", name)
    time.sleep(seconds)
    note("end", name)


task = app.task(work, name="work")

if __name__ == "__main__":
    send_all(task.delay)
