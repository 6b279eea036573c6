"""Section FALLBACK: what follows each outcome. Time is a number here; nothing sleeps."""

import itertools
import random

import pytest

import llm_router as R

SETTINGS = R.Settings()
NOW = 1000.0


def candidate(ref, **fields):
    provider_id, _, model_id = ref.partition("/")
    model = R.Model(model_id, **fields)
    return R.Candidate(ref, R.Provider(provider_id, models=(model,)), model, model_id)


def plan(*refs):
    return tuple(ref if isinstance(ref, R.Candidate) else candidate(ref) for ref in refs)


def known(book):
    """The keys that the book remembers something of."""
    return book.known()


def outcome(kind, retry_after=None, status=0):
    return R.Outcome(kind, status, kind, R.ErrorInfo(502, "x"), retry_after)


class Request:
    """One request against a book: applies every change as the gateway does."""

    ids = itertools.count()

    def __init__(self, book, its_plan, settings=SETTINGS, now=NOW, accepts_empty=False, id=None):
        self.book, self.settings, self.now = book, settings, now
        self.take(R.begin(id or "r%d" % next(self.ids), its_plan, settings, book, now))
        self.run = self.run._replace(accepts_empty=accepts_empty)

    def take(self, step):
        self.run, self.action, changes = step
        self.book.apply(changes)

    def fail(self, kind, retry_after=None, jitter=0.0, after=0.0):
        result = kind if isinstance(kind, R.Outcome) else outcome(kind, retry_after)
        self.now += after
        self.take(R.follow(self.run, result, self.book, self.now, jitter))
        return self.action

    def succeed(self, asked_at=None):
        self.book.apply(R.succeed(self.run, self.now if asked_at is None else asked_at, self.book))
        self.book.apply(R.release(self.run))

    def leave(self):
        self.book.apply(R.release(self.run))

    @property
    def ref(self):
        return self.action.candidate.ref if isinstance(self.action, R.Try) else None


def order(its_plan, book, now=NOW, settings=SETTINGS):
    """The refs that a request at `now` tries when nobody can serve it."""
    request, refs = Request(_copy(book), its_plan, settings, now), []
    while request.ref:
        refs.append(request.ref)
        request.fail(R.EMPTY)
    return refs


def _copy(book):
    copy = R.HealthBook()
    copy._entries = dict(book._entries)
    return copy


def settings(**changes):
    return SETTINGS._replace(**changes)


# ---- every story of four outcomes

PLANS = [
    ("a/1",),
    ("a/1", "a/2"),
    ("a/1", "b/1"),
    ("a/1", "a/2", "b/1"),
    ("a/1", "b/1", "a/2"),
    ("a/1", "b/1", "b/2"),
]  # every second: one of each length
STORY = [
    (R.OK, None), (R.RATE_LIMITED, None), (R.RATE_LIMITED, 5.0), (R.TEMPORARY, None), (R.TEMPORARY, 100.0), (R.TIMEOUT, None), (R.EMPTY, None),
    (R.BILLING, None), (R.AUTH, None), (R.FORBIDDEN, None), (R.NOT_FOUND, None), (R.POLICY, None), (R.INVALID, None), (R.OVERFLOW, None),
]  # fmt: skip
TWINS = {R.BILLING, R.FORBIDDEN, R.OVERFLOW}  # they do what AUTH, NOT_FOUND and INVALID do: told in stories of three
NEVER_BACK = (R.AUTH, R.BILLING, R.FORBIDDEN, R.NOT_FOUND)


class Teller:
    """Tells every story over one plan and checks the promises after every step. A story goes on with the next request
    when one has ended: the second one a second later and when every cooldown is over, further ones in between."""

    def __init__(self, refs, its_settings, accepts_empty=False, story=STORY):
        self.story = story
        self.plan = plan(*refs)
        self.settings = its_settings
        self.accepts_empty = accepts_empty
        self.origin = self.plan[0]
        self.steps = 0
        self.told = set()  # where a request began: stories that meet there go on alike

    def tell(self, depth):
        self.request(R.HealthBook(), NOW, depth, 0)

    def request(self, book, now, depth, number):
        beginning = (frozenset(book._entries.items()), now, depth)
        if beginning in self.told:
            return
        self.told.add(beginning)
        id = "r%d" % number
        run, action, changes = R.begin(id, self.plan, self.settings, book, now)
        step = run._replace(accepts_empty=self.accepts_empty), action, changes
        self.go_on(book, step, now, depth, number, (), None)

    def go_on(self, book, step, now, depth, number, tried, last):
        """tried: (candidate, kind) of every attempt of this request; last: its last outcome."""
        run, action, changes = step
        before, book = book, _copy(book)
        book.apply(changes)
        self.check(before, book, run, action, now, tried, last)
        self.steps += 1
        if depth == 0:
            return
        if not isinstance(action, R.Try):
            for later in (1.0, 100_000.0) if number == 0 else (50.0,):
                self.request(book, now + later, depth, number + 1)
            return
        now += action.delay_ms / 1000 + 0.25
        for kind, retry_after in self.story:
            if kind == R.OK:
                after = _copy(book)
                after.apply(R.succeed(run, now, after))
                self.check_end(after, run)
                assert after.read(action.candidate.ref) == R.HEALTHY
                self.request(after, now + 1, depth - 1, number + 1)
                continue
            result = outcome(kind, retry_after)
            follow = R.follow(run, result, book, now, 0.5)
            self.go_on(book, follow, now, depth - 1, number, (*tried, (action.candidate, kind)), result)

    def check(self, before, book, run, action, now, tried, last):
        for key in set(known(before)) | set(known(book)):
            assert book.read(key).cooldown_until >= before.read(key).cooldown_until  # never shortened
            assert book.read(key).failures <= before.read(key).failures + 1
        counts = {c.ref: sum(1 for t, _ in tried if t is c) for c in self.plan}
        for one in self.plan[1:]:
            assert counts[one.ref] <= 1
        if isinstance(action, R.Try):
            self.check_try(book, run, action, now, tried, last, counts)
        else:
            self.check_end(book, run)
            self.check_answer(run, action, tried, last, counts)

    def check_try(self, book, run, action, now, tried, last, counts):
        chosen = action.candidate
        if last is not None and chosen is tried[-1][0]:  # a retry
            assert chosen is self.origin
            assert last.kind == R.TEMPORARY
            assert counts[chosen.ref] < self.settings.origin_retry_attempts
            assert 0 < action.delay_ms <= self.settings.origin_retry_max_delay_ms
            assert (last.retry_after or 0) * 1000 <= action.delay_ms
            return
        assert counts[chosen.ref] == 0
        assert action.delay_ms == 0
        left = [c for c in self.plan if counts[c.ref] == 0]
        blamed = {c.provider.id for c, kind in tried if kind in (R.AUTH, R.BILLING)}
        fences = {c.provider.id for c, kind in tried if kind == R.POLICY and not self.settings.allow_policy_fallback}
        if fences:
            assert {chosen.provider.id} == fences  # a block never leaks to another provider
        others = [c for c in left if c.provider.id not in blamed and (not fences or c.provider.id in fences)]
        assert chosen in others or not others  # other providers first
        ready = [c for c in others if R.ready_at(c, book) <= now]
        free = [c for c in ready if book.read(c.ref).circuit_until == 0]
        assert chosen in ready or not ready  # what cools goes last
        if chosen in free and not [c for c in ready if c not in free]:
            assert chosen is free[0]  # in the order of the plan
        if chosen not in ready and chosen in others:
            assert R.ready_at(chosen, book) == min(R.ready_at(c, book) for c in others)  # soonest back first
        probing = R.ready_at(chosen, book) <= now and book.read(chosen.ref).circuit_until > 0
        cools = R.ready_at(chosen, book) > now
        assert run.allowed == (
            self.settings.origin_retry_attempts if chosen is self.origin and not cools and not probing else 1
        )
        assert bool(book.read(chosen.ref).probe) == probing

    def check_answer(self, run, action, tried, last, counts):
        assert tried
        refused = tried[-1][0] is self.origin and last.kind in (R.INVALID, R.OVERFLOW)
        if refused or last.kind == R.EMPTY and self.accepts_empty:
            assert isinstance(action, R.Deliver)
            assert action.outcome is last
            return
        fences = {c.provider.id for c, kind in tried if kind == R.POLICY and not self.settings.allow_policy_fallback}
        for one in self.plan:
            assert counts[one.ref] or fences and one.provider.id not in fences  # nobody is refused
        origins = [kind for c, kind in tried if c is self.origin]
        decides = origins[-1] if origins else last.kind
        assert action.outcome.kind == decides  # the origin's last outcome decides
        assert isinstance(action, R.Deliver) == (decides in (R.EMPTY, R.POLICY, R.INVALID, R.OVERFLOW))
        if isinstance(action, R.GiveUp):
            assert (action.retry_after is None) == (decides in NEVER_BACK)
            assert action.retry_after is None or action.retry_after >= 1

    def check_end(self, book, run):
        assert not [key for key in known(book) if book.read(key).probe == run.id]


@pytest.mark.parametrize("refs", PLANS, ids="-".join)
def test_every_story_of_four_outcomes_keeps_every_promise(refs):
    teller = Teller(refs, SETTINGS, story=[event for event in STORY if event[0] not in TWINS])
    teller.tell(4)
    assert teller.steps > 5_000


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"allow_policy_fallback": True},
        {"fallback_circuit_failures": 1},
        {"fallback_circuit_failures": 0},
        {"origin_retry_attempts": 1},
        {"origin_retry_attempts": 2, "fallback_circuit_failures": 1},
        {
            "origin_rate_limit_cooldown_ms": 0,
            "origin_fallback_cooldown_ms": 0,
            "origin_auth_cooldown_ms": 0,
            "origin_billing_cooldown_ms": 0,
        },
    ],
    ids=lambda changes: ",".join("%s=%s" % pair for pair in changes.items()),
)
@pytest.mark.parametrize("refs", PLANS[::2], ids="-".join)
def test_every_story_of_three_outcomes_keeps_every_promise_under_other_settings(refs, changes):
    Teller(refs, settings(**changes)).tell(3)


@pytest.mark.parametrize("refs", PLANS[::2], ids="-".join)
def test_every_story_after_a_tool_result_ends_with_the_first_empty_answer(refs):
    Teller(refs, SETTINGS, accepts_empty=True).tell(3)


@pytest.mark.parametrize("seed", range(5))
def test_every_request_ends_even_when_it_may_wait(seed):
    """A Retry-After of a millisecond must not become a loop."""
    rng = random.Random(seed)
    for _ in range(500):
        refs = rng.choice(PLANS)
        its = settings(
            retry_after_wait_ms=rng.choice([1, 1000, 60_000]),
            origin_retry_attempts=rng.choice([1, 3]),
            fallback_circuit_failures=rng.choice([0, 1, 2]),
        )
        book, now = R.HealthBook(), NOW
        for _ in range(4):
            request, waited, attempts = Request(book, plan(*refs), its, now), 0, 0
            while request.ref:
                waited += 0 if request.run.tries else request.action.delay_ms  # else it is a retry's backoff
                attempts += 1
                kind = rng.choice([R.RATE_LIMITED, R.TEMPORARY, R.TIMEOUT, R.EMPTY, R.POLICY])
                request.fail(kind, rng.choice([None, 0.001, 0.5, 20.0]), after=request.action.delay_ms / 1000)
            assert attempts <= its.origin_retry_attempts + len(refs)
            assert waited <= its.retry_after_wait_ms
            now = request.now + rng.choice([0.1, 10, 100])


# ---- retries and backoff (CONTRACT 5)


@pytest.mark.parametrize(
    "retry, full", [(1, 250), (2, 500), (3, 1000), (4, 2000), (5, 3000), (9, 3000), (10_000, 3000)]
)
def test_the_delay_before_retry_n_is_base_times_2_to_the_n_minus_1_at_most_max_times_half_to_all(retry, full):
    assert R.backoff_ms(retry, SETTINGS, 0.0) == full // 2
    assert R.backoff_ms(retry, SETTINGS, 1.0) == full
    delays = [R.backoff_ms(retry, SETTINGS, step / 100) for step in range(101)]
    assert delays == sorted(delays)


def test_a_base_above_the_max_and_zeros_are_no_trouble():
    assert R.backoff_ms(1, settings(origin_retry_base_delay_ms=9000), 1.0) == 3000
    assert R.backoff_ms(3, settings(origin_retry_base_delay_ms=0), 1.0) == 0


@pytest.mark.parametrize("attempts", [1, 2, 3, 10])
def test_the_origin_has_its_attempts_for_temporary_failures_and_each_fallback_one(attempts):
    request = Request(R.HealthBook(), plan("a/1", "b/1", "c/1"), settings(origin_retry_attempts=attempts))
    seen = []
    while request.ref:
        seen.append((request.ref, request.action.delay_ms))
        request.fail(R.TEMPORARY, jitter=1.0)
    delays = [0, 250, 500, 1000, 2000, 3000, 3000, 3000, 3000, 3000]
    assert seen == [("a/1", delay) for delay in delays[:attempts]] + [("b/1", 0), ("c/1", 0)]


@pytest.mark.parametrize("kind", [R.RATE_LIMITED, R.TIMEOUT, R.EMPTY, R.BILLING, R.AUTH, R.FORBIDDEN, R.NOT_FOUND])
def test_only_temporary_failures_are_retried_everything_else_goes_straight_to_the_next(kind):
    request = Request(R.HealthBook(), plan("a/1", "b/1"))
    request.fail(kind)
    assert (request.ref, request.action.delay_ms) == ("b/1", 0)


@pytest.mark.parametrize(
    "retry_after, retried", [(None, True), (0, True), (0.249, True), (0.25, True), (0.251, False), (60, False)]
)
def test_a_retry_after_longer_than_the_next_delay_means_no_retry(retry_after, retried):
    request = Request(R.HealthBook(), plan("a/1", "b/1"))
    request.fail(R.TEMPORARY, retry_after, jitter=1.0)
    assert request.ref == ("a/1" if retried else "b/1")


# ---- cooldowns

COOLDOWNS = [
    (R.RATE_LIMITED, "a/1", 30), (R.TEMPORARY, "a/1", 45), (R.TIMEOUT, "a/1", 45), (R.NOT_FOUND, "a/1", 45), (R.FORBIDDEN, "a/1", 600),
    (R.AUTH, "a/", 600), (R.BILLING, "a/", 900), (R.EMPTY, None, 0), (R.POLICY, None, 0), (R.INVALID, None, 0), (R.OVERFLOW, None, 0),
]  # fmt: skip


@pytest.mark.parametrize("kind, key, seconds", COOLDOWNS)
@pytest.mark.parametrize("is_origin", [True, False])
def test_each_outcome_cools_its_scope_for_its_time_fallbacks_too(kind, key, seconds, is_origin):
    """Traps 145, 148."""
    book = R.HealthBook()
    request = Request(book, plan("a/1", "b/1") if is_origin else plan("b/1", "a/1"), settings(origin_retry_attempts=1))
    if not is_origin:
        request.fail(R.EMPTY)
    request.fail(kind)
    assert {k: book.read(k).cooldown_until - NOW for k in known(book) if book.read(k).cooldown_until} == (
        {key: seconds} if key else {}
    )


def test_a_retry_after_counts_exactly_where_it_was_told():
    for kind, told, expected in (
        (R.RATE_LIMITED, 7.5, 7.5),
        (R.TEMPORARY, 90, 90),
        (R.TIMEOUT, 3, 3),
        (R.RATE_LIMITED, 0, 0),
        (R.BILLING, 7, 900),
        (R.AUTH, 7, 600),
    ):
        book = R.HealthBook()
        Request(book, plan("a/1", "b/1"), settings(fallback_circuit_failures=0)).fail(kind, told)
        assert max([book.read(key).cooldown_until - NOW for key in known(book)], default=0) == expected


def test_an_only_candidate_is_not_cooled_by_a_temporary_failure_unless_told():
    """The cooldown starts "once the router had to fall back"."""
    book = R.HealthBook()
    request = Request(book, plan("a/1"), settings(origin_retry_attempts=1))
    request.fail(R.TEMPORARY)
    assert book.read("a/1").cooldown_until == 0
    Request(book, plan("a/1"), settings(origin_retry_attempts=1)).fail(R.TEMPORARY, 20)
    assert book.read("a/1").cooldown_until == NOW + 20


def test_a_new_cooldown_never_shortens_an_older_one():
    """Trap 147."""
    book = R.HealthBook()
    Request(book, plan("a/1", "b/1")).fail(R.RATE_LIMITED, 3600)
    request = Request(book, plan("a/1", "b/1"))
    request.fail(R.EMPTY)
    assert request.fail(R.RATE_LIMITED, 5).outcome.kind == R.RATE_LIMITED
    assert book.read("a/1").cooldown_until == NOW + 3600


def test_a_cooling_candidate_goes_last_soonest_back_first_and_is_never_refused():
    """Traps 151, 166."""
    book = R.HealthBook()
    book.apply(
        [R.HealthChange("a/1", cooldown_until=NOW + 50, at=NOW), R.HealthChange("b/1", cooldown_until=NOW + 9, at=NOW)]
    )
    assert order(plan("a/1", "b/1", "c/1"), book) == ["c/1", "b/1", "a/1"]
    assert order(plan("a/1"), book) == ["a/1"]
    assert order(plan("a/1", "b/1", "c/1"), book, NOW + 9) == ["b/1", "c/1", "a/1"]
    assert order(plan("a/1", "b/1", "c/1"), book, NOW + 50) == ["a/1", "b/1", "c/1"]


def test_a_cooling_provider_cools_all_its_models():
    book = R.HealthBook()
    Request(book, plan("a/1", "b/1")).fail(R.BILLING)
    assert order(plan("a/2", "b/1"), book) == ["b/1", "a/2"]


def test_while_it_cools_the_origin_has_one_attempt():
    book = R.HealthBook()
    book.apply([R.HealthChange("a/1", cooldown_until=NOW + 50, at=NOW)])
    request = Request(book, plan("a/1", "b/1"))
    request.fail(R.TEMPORARY)
    assert request.ref == "a/1"
    assert isinstance(request.fail(R.TEMPORARY), R.GiveUp)


def test_candidates_are_sorted_again_after_each_outcome():
    request = Request(R.HealthBook(), plan("a/1", "a/2", "b/1"))
    assert request.fail(R.BILLING).candidate.ref == "b/1"
    request = Request(R.HealthBook(), plan("a/1", "b/1", "a/2", "c/1"))
    assert request.fail(R.RATE_LIMITED).candidate.ref == "b/1"
    assert request.fail(R.AUTH).candidate.ref == "a/2"


@pytest.mark.parametrize("kind", [R.AUTH, R.BILLING])
def test_after_a_bad_key_or_no_credit_other_providers_go_first_even_without_a_cooldown(kind):
    its = settings(origin_auth_cooldown_ms=0, origin_billing_cooldown_ms=0)
    book = R.HealthBook()
    book.apply([R.HealthChange("b/1", cooldown_until=NOW + 99, at=NOW)])
    request = Request(book, plan("a/1", "a/2", "b/1"), its)
    assert [request.ref, request.fail(kind).candidate.ref, request.fail(R.EMPTY).candidate.ref] == ["a/1", "b/1", "a/2"]


# ---- what is refused, blocked or empty


@pytest.mark.parametrize("kind", [R.INVALID, R.OVERFLOW])
def test_a_400_from_the_origin_is_returned_at_once_and_from_a_fallback_the_next_gets_its_chance(kind):
    book = R.HealthBook()
    refused = outcome(kind, status=400)
    action = Request(book, plan("a/1", "b/1")).fail(refused)
    assert (type(action), action.outcome is refused, known(book)) == (R.Deliver, True, [])
    request = Request(book, plan("a/1", "b/1", "c/1"))
    request.fail(R.RATE_LIMITED)
    assert request.fail(kind).candidate.ref == "c/1"
    assert request.fail(kind).outcome.kind == R.RATE_LIMITED
    assert "b/1" not in known(book)


def test_an_origin_that_cools_and_is_tried_last_still_has_the_last_word():
    book = R.HealthBook()
    book.apply([R.HealthChange("a/1", cooldown_until=NOW + 50, at=NOW)])
    request = Request(book, plan("a/1", "b/1"))
    request.fail(R.INVALID)
    assert request.ref == "a/1"
    assert isinstance(request.fail(R.INVALID), R.Deliver)


def test_a_policy_block_stays_inside_its_provider_and_says_nothing_about_health():
    book = R.HealthBook()
    request = Request(book, plan("a/1", "b/1", "a/2", "b/2"))
    assert request.fail(R.POLICY).candidate.ref == "a/2"
    action = request.fail(R.POLICY)
    assert (type(action), action.outcome.kind, known(book)) == (R.Deliver, R.POLICY, [])


def test_with_policy_fallback_allowed_a_block_cools_the_model_and_others_are_asked():
    book = R.HealthBook()
    request = Request(book, plan("a/1", "b/1"), settings(allow_policy_fallback=True))
    assert request.fail(R.POLICY).candidate.ref == "b/1"
    assert book.read("a/1").cooldown_until == NOW + 120
    assert isinstance(request.fail(R.POLICY), R.Deliver)


def test_waiting_never_carries_a_blocked_request_to_another_provider():
    book = R.HealthBook()
    book.apply(
        [
            R.HealthChange(ref, cooldown_until=NOW + wait, at=NOW)
            for ref, wait in (("c/1", 0.4), ("b/1", 0.2), ("a/1", 0.3))
        ]
    )
    its = settings(retry_after_wait_ms=5000)
    request, refs = Request(book, plan("a/1", "b/1", "c/1"), its), []
    for kind in (R.POLICY, R.RATE_LIMITED, R.RATE_LIMITED, R.RATE_LIMITED):
        refs.append(request.ref)
        if request.ref:
            request.fail(kind, 0.1, after=request.action.delay_ms / 1000)
    assert refs == ["b/1", None, None, None]
    book = R.HealthBook()
    book.apply([R.HealthChange("c/1", cooldown_until=NOW + 0.3, at=NOW)])
    request = Request(book, plan("a/1", "b/1", "c/1"), its)
    request.fail(R.RATE_LIMITED, 3)
    assert request.ref == "b/1"
    book.apply([R.HealthChange("b/1", cooldown_until=NOW + 9, at=NOW)])  # by another request, in the meantime
    assert isinstance(request.fail(R.POLICY), R.GiveUp)


def test_an_empty_answer_falls_back_at_once_and_is_the_answer_when_all_are_empty():
    """Traps 138, 140."""
    book = R.HealthBook()
    request = Request(book, plan("a/1", "b/1"))
    assert (request.fail(R.EMPTY).candidate.ref, request.action.delay_ms) == ("b/1", 0)
    action = request.fail(R.EMPTY)
    assert (type(action), action.outcome.kind, known(book)) == (R.Deliver, R.EMPTY, [])


def test_after_a_tool_result_an_empty_answer_is_the_answer():
    assert isinstance(Request(R.HealthBook(), plan("a/1", "b/1"), accepts_empty=True).fail(R.EMPTY), R.Deliver)


def test_the_origins_last_outcome_decides_when_all_have_failed():
    for first, second, expected in (
        (R.EMPTY, R.TIMEOUT, R.EMPTY),
        (R.TIMEOUT, R.EMPTY, R.TIMEOUT),
        (R.AUTH, R.RATE_LIMITED, R.AUTH),
        (R.RATE_LIMITED, R.POLICY, R.RATE_LIMITED),
    ):
        request = Request(R.HealthBook(), plan("a/1", "b/1"))
        request.fail(first)
        assert request.fail(second).outcome.kind == expected


def test_giving_up_tells_the_soonest_recovery_and_nothing_when_there_is_none():
    """Trap 126."""
    request = Request(R.HealthBook(), plan("a/1", "b/1"))
    request.fail(R.RATE_LIMITED, 90)
    action = request.fail(R.RATE_LIMITED, 40, after=10)
    assert (type(action), action.retry_after) == (R.GiveUp, 40)
    request = Request(R.HealthBook(), plan("a/1"), settings(origin_retry_attempts=1))
    assert request.fail(R.TEMPORARY).retry_after == 1
    for kind in (R.AUTH, R.BILLING, R.FORBIDDEN, R.NOT_FOUND):
        assert Request(R.HealthBook(), plan("a/1")).fail(kind).retry_after is None


# ---- context fallback (trap 154)


def windows(*sizes):
    return plan(*(candidate("%s/1" % name, context_window=size) for name, size in zip("abcde", sizes)))


def test_with_context_fallback_an_overflow_goes_to_larger_windows_only_and_cools_nobody():
    book, its = R.HealthBook(), settings(context_fallback=True)
    request, refs = Request(book, windows(100, 100, None, 300, 200), its), []
    while request.ref:
        refs.append(request.ref)
        request.fail(R.OVERFLOW)
    assert refs == ["a/1", "d/1", "e/1"]
    assert (type(request.action), request.action.outcome.kind, known(book)) == (R.Deliver, R.OVERFLOW, [])


def test_with_context_fallback_an_overflow_goes_to_anybody_when_the_windows_are_unknown():
    request, refs = Request(R.HealthBook(), windows(None, None, 300), settings(context_fallback=True)), []
    while request.ref:
        refs.append(request.ref)
        request.fail(R.OVERFLOW)
    assert refs == ["a/1", "b/1", "c/1"]


def test_an_overflow_is_the_answer_when_no_window_is_larger_or_the_setting_is_off():
    """Trap 156: the error must reach the agent, which then compacts."""
    for its, sizes in ((settings(context_fallback=True), (100, 100, 50)), (settings(), (100, 200, 300))):
        request = Request(R.HealthBook(), windows(*sizes), its)
        assert isinstance(request.fail(R.OVERFLOW), R.Deliver)
    assert isinstance(
        Request(R.HealthBook(), windows(100, 200), settings(context_fallback=True)).fail(R.INVALID), R.Deliver
    )


# ---- waiting


@pytest.mark.parametrize(
    "wait_ms, cooling_s, delay_ms", [(0, 0.5, 0), (400, 0.5, 0), (500, 0.5, 500), (5000, 0.5, 500), (5000, 60, 0)]
)
def test_a_request_waits_for_a_cooling_candidate_at_most_retry_after_wait_ms(wait_ms, cooling_s, delay_ms):
    book = R.HealthBook()
    book.apply([R.HealthChange("a/1", cooldown_until=NOW + cooling_s, at=NOW)])
    request = Request(book, plan("a/1"), settings(retry_after_wait_ms=wait_ms))
    assert (request.ref, request.action.delay_ms) == ("a/1", delay_ms)


def test_when_all_cool_a_request_waits_once_for_the_soonest_and_tries_it_again():
    request = Request(R.HealthBook(), plan("a/1", "b/1"), settings(retry_after_wait_ms=2000))
    request.fail(R.RATE_LIMITED, 1.5)
    request.fail(R.RATE_LIMITED, 1.0)
    assert (request.ref, request.action.delay_ms) == ("b/1", 1000)
    assert isinstance(request.fail(R.RATE_LIMITED, 0.5, after=1.0), R.GiveUp)


def test_nobody_waits_for_what_waiting_does_not_cure():
    for kind in (R.AUTH, R.BILLING, R.FORBIDDEN, R.NOT_FOUND, R.EMPTY):
        its = settings(
            retry_after_wait_ms=60_000,
            origin_auth_cooldown_ms=100,
            origin_billing_cooldown_ms=100,
            origin_fallback_cooldown_ms=100,
        )
        assert not isinstance(Request(R.HealthBook(), plan("a/1"), its).fail(kind), R.Try)


@pytest.mark.parametrize("refs, change, follows", [
    (("a/1", "b/1"), {"cooldown_until": NOW + 30}, "b/1"),
    (("a/1", "b/1"), {"circuit_until": NOW + 30}, "b/1"),
    (("a/1", "b/1"), {"cooldown_until": NOW + 0.1}, "a/1"),  # over before the retry
    (("a/1",), {"circuit_until": NOW + 30}, "a/1"),  # there is nobody else
])  # fmt: skip
def test_a_retry_is_left_out_when_another_request_has_cooled_the_origin_meanwhile(refs, change, follows):
    """Trap 142: else a Retry-After that one request was told is broken by all that were under way."""
    book = R.HealthBook()
    request = Request(book, plan(*refs))
    book.apply([R.HealthChange("a/1", at=NOW, **change)])
    request.fail(R.TEMPORARY)
    assert request.ref == follows


# ---- the total time


def test_when_the_total_time_is_up_nobody_is_asked_any_more_and_who_was_not_asked_is_not_blamed():
    request = Request(R.HealthBook(), plan("a/1", "b/1"), settings(total_timeout_ms=1000, retry_after_wait_ms=60_000))
    action = request.fail(R.TIMEOUT, after=1.0)
    assert (type(action), action.outcome.kind, known(request.book)) == (R.GiveUp, R.TIMEOUT, ["a/1"])


def test_a_fallback_that_had_only_what_others_left_of_the_total_time_is_not_blamed():
    for kind, blamed in ((R.TIMEOUT, ["a/1"]), (R.TEMPORARY, ["a/1", "b/1"])):
        its = settings(total_timeout_ms=1000, origin_retry_attempts=1)
        request = Request(R.HealthBook(), plan("a/1", "b/1"), its)
        request.fail(R.TEMPORARY, after=0.9)
        assert isinstance(request.fail(kind, after=0.1), R.GiveUp)
        assert known(request.book) == blamed
    request = Request(R.HealthBook(), plan("a/1", "b/1"), its)
    request.fail(R.TEMPORARY, after=0.1)
    request.fail(R.TIMEOUT, after=0.1)  # a limit of its own, while there was time left
    assert known(request.book) == ["a/1", "b/1"]


@pytest.mark.parametrize("failed_after_s, follows", [(0.7, "a/1"), (0.8, "b/1")])
def test_a_retry_that_would_come_after_the_total_time_leaves_it_to_a_fallback(failed_after_s, follows):
    request = Request(R.HealthBook(), plan("a/1", "b/1"), settings(total_timeout_ms=1000))
    request.fail(R.TEMPORARY, jitter=1.0, after=failed_after_s)
    assert request.ref == follows


def test_nobody_waits_for_a_candidate_that_is_back_after_the_total_time():
    for total_ms, follows in ((2000, R.Try), (1000, R.GiveUp)):
        request = Request(R.HealthBook(), plan("a/1"), settings(total_timeout_ms=total_ms, retry_after_wait_ms=60_000))
        assert isinstance(request.fail(R.RATE_LIMITED, 1.0), follows)


# ---- the circuit


def break_circuit(book, its=SETTINGS, refs=("a/1", "b/1"), now=NOW, times=2):
    for _ in range(times):
        request = Request(book, plan(*refs), its, now)
        while request.ref != "a/1":
            request.fail(R.EMPTY)
        while request.ref == "a/1":
            request.fail(R.TEMPORARY)
        request.leave()


def test_the_circuit_counts_requests_not_attempts_and_opens_at_the_configured_number():
    """Trap 149."""
    book = R.HealthBook()
    break_circuit(book, times=1)
    assert (book.read("a/1").failures, book.read("a/1").circuit_until) == (1, 0)
    break_circuit(book, times=1)
    assert (book.read("a/1").failures, book.read("a/1").circuit_until) == (2, NOW + 30)


def test_a_request_that_waits_and_fails_again_still_counts_once():
    book = R.HealthBook()
    request = Request(book, plan("a/1"), settings(retry_after_wait_ms=5000))
    request.fail(R.TEMPORARY, 1)
    assert request.ref == "a/1"
    assert isinstance(request.fail(R.TEMPORARY, 1, after=1), R.GiveUp)
    assert book.read("a/1").failures == 1


def test_a_sole_candidate_has_a_circuit_as_well_and_is_still_asked():
    """Trap 150."""
    book = R.HealthBook()
    break_circuit(book, refs=("a/1",))
    assert book.read("a/1").circuit_until == NOW + 30
    request = Request(book, plan("a/1"))
    assert (request.ref, request.run.allowed) == ("a/1", 1)


@pytest.mark.parametrize(
    "kind", [R.RATE_LIMITED, R.BILLING, R.AUTH, R.FORBIDDEN, R.NOT_FOUND, R.EMPTY, R.POLICY, R.INVALID, R.OVERFLOW]
)
def test_only_temporary_failures_and_timeouts_count_for_the_circuit(kind):
    book = R.HealthBook()
    for _ in range(5):
        Request(book, plan("a/1")).fail(kind)
    assert book.read("a/1").failures == 0


@pytest.mark.parametrize("changes", [{"fallback_circuit_failures": 0}, {"fallback_circuit_cooldown_ms": 0}])
def test_either_value_0_means_no_circuit_and_cooldowns_stay(changes):
    book = R.HealthBook()
    break_circuit(book, settings(**changes), times=5)
    assert (book.read("a/1").circuit_until, book.read("a/1").failures) == (0, 0)
    assert book.read("a/1").cooldown_until == NOW + 45


def test_an_open_circuit_goes_last_and_half_open_starts_when_cooldown_and_circuit_have_both_expired():
    book = R.HealthBook()
    break_circuit(book)
    assert order(plan("a/1", "b/1"), book, NOW + 29) == ["b/1", "a/1"]
    assert order(plan("a/1", "b/1"), book, NOW + 44) == ["b/1", "a/1"]
    request = Request(book, plan("a/1", "b/1"), now=NOW + 45)
    assert (request.ref, request.run.allowed, book.read("a/1").probe) == ("a/1", 1, request.run.id)


def test_in_half_open_one_request_probes_and_others_see_the_candidate_last_but_may_still_use_it():
    """Trap 152."""
    book = R.HealthBook()
    break_circuit(book)
    probe = Request(book, plan("a/1", "b/1"), now=NOW + 60)
    other = Request(book, plan("a/1", "b/1"), now=NOW + 60)
    assert (probe.ref, other.ref) == ("a/1", "b/1")
    assert other.fail(R.EMPTY).candidate.ref == "a/1"
    assert book.read("a/1").probe == probe.run.id
    other.fail(R.EMPTY)
    assert book.read("a/1").probe == probe.run.id


def test_a_probe_that_succeeds_closes_the_circuit_and_one_that_fails_opens_it_again():
    for succeeds in (True, False):
        book = R.HealthBook()
        break_circuit(book)
        probe = Request(book, plan("a/1", "b/1"), now=NOW + 60)
        if succeeds:
            probe.succeed()
            assert book.read("a/1") == R.HEALTHY
        else:
            assert probe.fail(R.TEMPORARY).candidate.ref == "b/1"
            assert book.read("a/1").circuit_until == NOW + 90
            assert book.read("a/1").probe == ""


@pytest.mark.parametrize(
    "kind",
    [
        None,
        R.RATE_LIMITED,
        R.TIMEOUT,
        R.EMPTY,
        R.BILLING,
        R.AUTH,
        R.FORBIDDEN,
        R.NOT_FOUND,
        R.POLICY,
        R.INVALID,
        R.OVERFLOW,
    ],
)
def test_a_probe_frees_its_slot_however_it_ends(kind):
    """kind None: the client left."""
    book = R.HealthBook()
    break_circuit(book)
    probe = Request(book, plan("a/1", "b/1"), now=NOW + 60)
    assert book.read("a/1").probe
    probe.leave() if kind is None else probe.fail(kind)
    assert book.read("a/1").probe == ""
    assert Request(book, plan("a/1"), now=NOW + 100_000).run.probes == ("a/1",)


def test_a_request_frees_only_its_own_slot():
    book = R.HealthBook()
    break_circuit(book)
    first = Request(book, plan("a/1"), now=NOW + 60)
    release = R.release(first.run)
    book.apply(release)
    second = Request(book, plan("a/1"), now=NOW + 61)
    book.apply(release)
    assert book.read("a/1").probe == second.run.id


@pytest.mark.parametrize("seed", range(5))
def test_at_most_one_request_probes_however_requests_interleave(seed):
    rng = random.Random(seed)
    for _ in range(60):
        book, live, now = R.HealthBook(), [], NOW
        its = settings(fallback_circuit_failures=1, origin_retry_attempts=rng.choice([1, 2]))
        for _ in range(80):
            now += rng.choice([0, 0.1, 5, 31, 50])
            if len(live) < 4 and rng.random() < 0.5:
                live.append(Request(book, plan(*rng.choice(PLANS)), its, now))
            elif live:
                request = rng.choice(live)
                request.now = now
                end = rng.randrange(12)
                if end == 0:
                    request.leave()
                elif end < 3:
                    request.succeed(now - rng.choice([0, 20]))
                else:
                    request.fail(
                        rng.choice([R.TEMPORARY, R.TIMEOUT, R.RATE_LIMITED, R.POLICY, R.INVALID, R.EMPTY]),
                        rng.choice([None, None, 3]),
                    )
                if end < 3 or not request.ref:
                    live.remove(request)
            holders = [ref for request in live for ref in request.run.probes]
            claimed = {ref: book.read(ref).probe for ref in known(book) if book.read(ref).probe}
            for ref, id in claimed.items():
                assert [r.run.id for r in live if ref in r.run.probes].count(id) == 1, "a slot without its holder"
            assert set(claimed) <= set(holders)
        for request in live:
            request.leave()
        assert not [ref for ref in known(book) if book.read(ref).probe]


# ---- success, late failures, the book


def test_success_clears_cooldown_and_circuit_of_model_and_provider():
    book = R.HealthBook()
    break_circuit(book)
    book.apply(
        [
            R.HealthChange("a/", cooldown_until=NOW + 600, at=NOW),
            R.HealthChange("a/2", cooldown_until=NOW + 600, at=NOW),
        ]
    )
    Request(book, plan("a/1"), now=NOW + 1).succeed()
    assert not {"a/1", "a/"} & set(known(book))
    assert book.read("a/2").cooldown_until == NOW + 600


def test_a_success_asked_before_a_newer_failure_clears_nothing():
    book = R.HealthBook()
    slow = Request(book, plan("a/1"), now=NOW)
    Request(book, plan("a/1", "b/1"), now=NOW + 5).fail(R.RATE_LIMITED, 60)
    slow.succeed(asked_at=NOW)
    assert book.read("a/1").cooldown_until == NOW + 65
    slow.succeed(asked_at=NOW + 5)
    assert known(book) == []


def test_an_empty_or_refused_request_does_not_clear_what_was_remembered():
    book = R.HealthBook()
    break_circuit(book, times=1)
    for kind in (R.EMPTY, R.INVALID):
        request = Request(book, plan("a/1"), now=NOW + 60)
        request.fail(kind)
        assert book.read("a/1").failures == 1


def test_a_failure_after_content_cools_and_counts_like_one_before():
    """Traps 14, 165."""
    book = R.HealthBook()
    request = Request(book, plan("a/1", "b/1"))
    request.succeed()
    book.apply(R.fail_late(request.run, outcome(R.TEMPORARY), book, NOW + 3))
    assert (book.read("a/1").cooldown_until, book.read("a/1").failures) == (NOW + 48, 1)
    assert book.read("a/1").probe == ""


def test_a_client_that_leaves_has_no_effect_on_health():
    """Trap 162."""
    book = R.HealthBook()
    Request(book, plan("a/1", "b/1")).leave()
    assert known(book) == []


def test_healthy_entries_are_forgotten_and_made_up_names_do_not_fill_the_book():
    book = R.HealthBook(limit=50)
    for n in range(500):
        Request(book, plan("w/made-up-%d" % n), settings(origin_retry_attempts=1)).fail(R.NOT_FOUND)
        assert len(known(book)) <= 50
    assert "w/made-up-499" in known(book)
    assert "w/made-up-0" not in known(book)
    book = R.HealthBook()
    for n in range(500):
        Request(book, plan("w/made-up-%d" % n)).succeed()
    assert known(book) == []


def test_what_is_told_again_is_not_the_oldest_that_gives_way():
    book = R.HealthBook(limit=2)
    for at, key in enumerate(("a/", "b/", "a/", "c/")):
        book.apply([R.HealthChange(key, cooldown_until=NOW + at, at=NOW)])
    assert known(book) == ["a/", "c/"]


def test_a_provider_that_is_configured_anew_is_healthy_whatever_older_requests_bring():
    book = R.HealthBook()
    changes = [R.HealthChange(key, cooldown_until=NOW + 60, at=NOW) for key in ("a/1", "a/", "ab/1")]
    book.apply(changes, NOW)
    book.renew(["a"], NOW + 1)
    book.apply(changes, NOW)
    assert known(book) == ["ab/1"]
    book.apply(changes, NOW + 1)
    assert len(known(book)) == 3


def test_decisions_do_not_change_the_book_or_the_run_they_were_given():
    book = R.HealthBook()
    break_circuit(book)
    entries = dict(book._entries)
    run, _, _ = R.begin("x", plan("a/1", "b/1"), SETTINGS, book, NOW + 60)
    before = repr(run)
    for kind in R.RULES:
        R.follow(run, outcome(kind), book, NOW + 61, 0.5)
    assert (book._entries, repr(run)) == (entries, before)


def test_every_kind_of_outcome_has_a_rule_whose_settings_exist():
    kinds = {
        R.RATE_LIMITED,
        R.TEMPORARY,
        R.TIMEOUT,
        R.EMPTY,
        R.BILLING,
        R.AUTH,
        R.FORBIDDEN,
        R.NOT_FOUND,
        R.POLICY,
        R.INVALID,
        R.OVERFLOW,
    }
    assert set(R.RULES) == kinds
    for kind in kinds:
        for its in (SETTINGS, settings(allow_policy_fallback=True)):
            rule = R.rule_for(kind, its)
            assert not rule.cooldown or hasattr(SETTINGS, rule.cooldown)
            assert rule.falls_back in ("all", "provider", "no")


def test_an_upstream_that_breaks_off_every_stream_opens_its_circuit():
    """A stream's start closes the circuit, but only a complete answer clears the failures counted so far (trap 150)."""
    settings = R.Settings()
    book = R.HealthBook()
    provider = R.Provider(id="a", models=(R.Model(id="m"),))
    plan = (R.Candidate("a/m", provider, provider.models[0], "m"),)
    for at in (1.0, 2.0):
        run, _, changes = R.begin("r%d" % at, plan, settings, book, at)
        book.apply(changes)
        book.apply(R.proceed(run, at, book))
        assert R.ready_at(plan[0], book) <= at
        book.apply(R.fail_late(run, outcome(R.TEMPORARY), book, at + 0.5))
    assert book.read("a/m").circuit_until == 2.5 + settings.fallback_circuit_cooldown_ms / 1000
    run, _, _ = R.begin("r3", plan, settings, book, 100.0)
    book.apply(R.proceed(run, 100.0, book) + R.succeed(run, 100.0, book))
    assert book.read("a/m") == R.HEALTHY
