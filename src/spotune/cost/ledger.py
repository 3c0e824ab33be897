"""The machines of a run in order, each accounted for; and the bills that follow from that."""

from collections.abc import Iterable

from spotune.contracts.errors import StoreError
from spotune.contracts.keys import Keys
from spotune.contracts.records import Bill
from spotune.contracts.store import Store
from spotune.cost.account import Account, account_of
from spotune.cost.bills import with_bills
from spotune.cost.evidence import Evidence
from spotune.cost.join import join


def build_accounts(evidence: Evidence, now: float) -> list[Account]:
    """What became of each machine, in order of time."""
    intervals = with_bills(evidence.intervals, evidence.bills)
    accounts: list[Account] = []
    done_before = 0
    for machine in join(intervals, evidence.attempts, now):
        events = evidence.events.get(machine.record.attempt, ()) if machine.record else ()
        account = account_of(machine, events, evidence, done_before, now)
        accounts.append(account)
        done_before = max([done_before, *account.committed, *(step.step for step in account.steps)])
    return accounts


def bills_due(evidence: Evidence, accounts: Iterable[Account]) -> list[Bill]:
    """The bills that can be written by now: closed intervals of attempts that have none yet.

    A machine that never claimed is billed once a later one has: until then its number may still be claimed.
    """
    billed = {bill.attempt for bill in evidence.bills}
    latest = max((record.attempt for record in evidence.attempts), default=0)
    bills = []
    for account in accounts:
        row, number = account.machine.interval, account.machine.attempt
        if row and number is not None and row.ended_at is not None and number <= latest and number not in billed:
            bills.append(
                Bill(
                    run_id=row.run_id,
                    attempt=number,
                    started_at=row.started_at,
                    ended_at=row.ended_at,
                    price=vars(account.price) if account.price else {},
                    nodes=row.nodes,
                    paid_s=account.paid_s,
                    cost_usd=account.cost_usd or 0.0,
                    end_reason=account.end_reason or "lost",
                    infra=row.infra,
                    region=row.region,
                    zone=row.zone,
                    instance_type=row.instance_type,
                    accelerators=row.accelerators,
                    use_spot=row.use_spot,
                    setup_s=row.setup_s,
                    reason=row.end_reason,
                    exit_code=row.exit_code,
                )
            )
    return bills


def write_bills(store: Store, bills: Iterable[Bill]) -> None:
    """Writes the bills that are not there yet; whoever may only read the bucket gets the report all the same."""
    for bill in bills:
        try:
            store.create(Keys(bill.run_id).bill(bill.attempt), bill.to_bytes())
        except StoreError:
            return
