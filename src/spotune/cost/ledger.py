"""The machines of a run in order, each accounted for; and the bills that follow from that."""

from collections.abc import Iterable, Sequence
from contextlib import suppress

from spotune.contracts.errors import BadRecord, InputError, StoreError
from spotune.contracts.keys import Keys
from spotune.contracts.records import AttemptRecord, Bill, check_paid
from spotune.contracts.store import Store
from spotune.cost.account import Account, account_of
from spotune.cost.bills import with_bills
from spotune.cost.evidence import Evidence
from spotune.cost.join import join
from spotune.launch.infra import State

_ON: tuple[State, ...] = ("STARTING", "RUNNING")  # a PENDING or RECOVERING run has no machine


def build_accounts(evidence: Evidence, now: float, state: State | None = None) -> list[Account]:
    """What became of each machine, in order of time.

    ``state``: the run's. The newest attempt of one that runs is on, also where the engine's row of it is not to be had.
    """
    billed, rows = with_bills(evidence.intervals, evidence.bills)
    newest = max((record.attempt for record in evidence.attempts), default=0) if state in _ON else 0
    accounts: list[Account] = []
    done_before = 0
    for machine in join(rows, evidence.attempts, now, billed):
        account = account_of(machine, evidence, done_before, now, is_on=machine.attempt == newest)
        accounts.append(account)
        done_before = max([done_before, *account.committed, *(step.step for step in account.steps)])
    return accounts


def bills_due(evidence: Evidence, accounts: Iterable[Account], is_over: bool = False) -> list[Bill]:
    """The bills that can be written by now: closed intervals of machines that have none yet.

    A machine that never claimed an attempt has the number that was left free for it, if any, once a later machine has
    claimed: until then it may still be. Without a number it is billed by its times, the last one once the run
    ``is_over``.
    """
    billed = {bill.attempt for bill in evidence.bills} - {0}
    latest = max((record.attempt for record in evidence.attempts), default=0)
    bills = []
    for account in accounts:
        row, number = account.machine.interval, account.machine.attempt
        if row is None or row.ended_at is None or account.machine.is_billed:
            continue
        has_number = number is not None and number <= latest
        if (number not in billed) if has_number else number is None or is_over:
            bills.append(
                Bill(
                    run_id=row.run_id,
                    attempt=number if number is not None and has_number else 0,
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


def leave_bills(store: Store, evidence: Evidence, accounts: Sequence[Account], is_over: bool) -> None:
    """Writes the bills that are due; whoever may only read the bucket gets the report all the same.

    Of a certified run whose every attempt is billed an index looks at nothing any more: that a machine is billed which
    claimed none, or came after the certificate, is said beside, and first, since a bill is written once.
    """
    due = [bill for bill in bills_due(evidence, accounts, is_over) if _is_readable(bill)]
    with suppress(InputError, StoreError):
        if (certificate := evidence.certificate) and _is_late(due, evidence.attempts, certificate.attempt):
            store.create(Keys(evidence.run.run_id).late, b"")
        write_bills(store, due)


def _is_late(due: Iterable[Bill], claims: Iterable[AttemptRecord], certified: int) -> bool:
    known = {record.attempt for record in claims if record.attempt <= certified}
    return any(bill.attempt not in known for bill in due)


def write_bills(store: Store, bills: Iterable[Bill]) -> None:
    """Writes the bills that are not there yet. Raises InputError or StoreError.

    One that its own reader would refuse is not written: it would stay for good, and a damaged row of an engine is none.
    """
    for bill in filter(_is_readable, bills):
        keys = Keys(bill.run_id)
        key = keys.bill(bill.attempt) if bill.attempt else keys.lost_bill(bill.started_at, bill.ended_at)
        store.create(key, bill.to_bytes())


def _is_readable(bill: Bill) -> bool:
    keys = Keys(bill.run_id)
    key = keys.bill(bill.attempt) if bill.attempt else f"{keys.lost}/"  # its name is made of times, if they are such
    try:
        check_paid(Bill.from_bytes(bill.to_bytes(), key), key)
    except BadRecord:
        return False
    return True
