"""Oracle against core, operation by operation.

A seeded plain driver makes up a history of operations as plain data. Both systems (request pool,
allocator and cache) carry it out side by side. After every operation the results, the sizes and the
digests are compared, and after every 1,000 the full views. A history that diverges is shrunk to a
short one that a person can paste into a test.

    config         what a run is made with, and what its documents are
    pair           two systems that are called as one
    coverage       what happened, counted in the oracle's views
    driver         the client: legal operations
    faults         the illegal ones
    ownership      who has which page of either pool: what both systems could get wrong
    windows        the client over an allocator with a window pool
    window_faults  its illegal operations
    history        making a history up, repeating it, shrinking it
    campaign       many seeds, several processes, one table

`python -m kvspec.conformance.lockstep --help` runs a campaign.
"""

from kvspec.conformance.lockstep.campaign import Campaign, Sides, campaign, shortfalls, table
from kvspec.conformance.lockstep.config import Config, configuration
from kvspec.conformance.lockstep.history import Failure, History, explore, reproducer, run, shrink
from kvspec.conformance.lockstep.pair import Divergence

__all__ = [
    "Campaign",
    "Config",
    "Divergence",
    "Failure",
    "History",
    "Sides",
    "campaign",
    "configuration",
    "explore",
    "reproducer",
    "run",
    "shortfalls",
    "shrink",
    "table",
]
