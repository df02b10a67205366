"""Which request runs when, in what company, and which is refused.

Decisions are pure: `policy` (bounds), `queue` (order), `fairness` (between tenants), `pace` (how fast the engine is and
whether a request can be in time), `limiter` (how many may be inside), `tuning` (how large batches should be). `batcher`
acts on them, with the threads of `workers`.
"""
