"""What the machine is: versions, device, driver, which backends and which peers there are."""

from __future__ import annotations

from fastrl.benchmark.machine import facts

from .record import Record


def run(record: Record) -> None:
    settings = record.settings
    record.facts.update(facts(settings.device))
    record.facts["backend under test"] = settings.backend
    for key, value in record.facts.items():
        record.say(f"{key}: {value}")
    works = record.facts["backends"].get(settings.backend) == "works"
    record.check("backend works", works, backend=settings.backend)
