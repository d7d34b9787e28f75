"""An Optuna study: it proposes settings, and remembers what came of them."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline import config
from pipeline import space as spaces
from pipeline.errors import needs
from pipeline.space import Distribution
from pipeline.study_file import Optuna, connected, explained, quiet
from pipeline.trials import Params, Trial

OURS = "search."
"""Begins the names of a stored trial's attributes that are no figures."""
FEW = 5
"""Complete trials below which nothing is said of importance."""

State = Literal["complete", "pruned", "failed"]
STATES: dict[str, State] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
"""How Optuna calls them."""


class Proposal(NamedTuple):
    """Settings that are to be tried."""

    number: int
    params: Params
    passed: frozenset[int]
    """Numbers of documents on which an earlier run found them worth more."""
    trial: Optuna


class Study:
    """Settings that were proposed, tried and told; a call at a time."""

    def __init__(
        self, study: Optuna, distributions: Mapping[str, Distribution], settings: config.Tune, seed: int
    ) -> None:
        self.optuna, self.study = needs("optuna", "tune"), study
        self.distributions, self.settings, self.seed = distributions, settings, seed
        found = study.get_trials(deepcopy=False)
        self.unfinished = [trial.number for trial in found if not trial.state.is_finished()]
        self.n_proposed = len(found)
        self.n_points = spaces.grid(distributions)
        self.points = {point(trial.params) for trial in found if trial.state.is_finished()}

    def standing(self) -> Iterator[tuple[Trial, str | None]]:
        """Trials that an earlier run finished, each with its task's key; repetitions left out."""
        for stored in self.study.get_trials(deepcopy=False):
            if stored.state.is_finished() and OURS + "same_as" not in stored.user_attrs:
                yield self.recalled(stored), stored.user_attrs.get(OURS + "key")

    def recalled(self, stored: Optuna) -> Trial:
        """A trial as it was told."""
        attrs, state = stored.user_attrs, STATES[stored.state.name]
        params = {name: stored.params[name] for name in self.distributions if name in stored.params}
        figures = {name: value for name, value in attrs.items() if not name.startswith(OURS)}
        value = None if state == "failed" else stored.value
        reason = attrs.get(OURS + "reason", "stopped") if state == "failed" else None
        seconds = attrs.get(OURS + "seconds", 0.0)
        return Trial(stored.number, spaces.decoded(params), state, value, figures, reason, seconds)

    def ask(self, at_random: bool) -> Proposal:
        """The next settings, those first that an earlier run left unfinished. The draw depends on the trial's number
        alone, so that a search that was interrupted goes on as it would have."""
        number = self.unfinished[0] if self.unfinished else self.n_proposed
        with proposing(self.study, self.sampler(number, at_random)):
            trial, passed = self.adopted(self.unfinished.pop(0)) if self.unfinished else (self.study.ask(), ())
            params = {name: suggested(trial, name, each) for name, each in self.distributions.items()}
        self.n_proposed = max(self.n_proposed, trial.number + 1)
        self.points.add(point(params))
        return Proposal(trial.number, spaces.decoded(params), frozenset(passed), trial)

    def adopted(self, number: int) -> tuple[Optuna, Iterable[int]]:
        """A trial that was begun before, as Optuna hands out new ones, and the numbers of documents it got to."""
        stored = self.study.get_trials(deepcopy=False)[number]
        return self.optuna.trial.Trial(self.study, stored._trial_id), stored.intermediate_values

    def sampler(self, number: int, at_random: bool) -> Optuna:
        """What draws the settings of this trial."""
        samplers, seed = self.optuna.samplers, int(config.digest([self.seed, number])[:8], 16)
        if self.settings.search == "grid":
            return samplers.GridSampler(spaces.grid_values(self.distributions), seed=abs(self.seed) % 2**32)
        if self.settings.search == "random" or at_random:
            return samplers.RandomSampler(seed=seed)
        n_startup = min(10, max(4, self.settings.trials // 3))
        many = self.settings.workers > 1
        with warnings.catch_warnings():  # Optuna 4 has these, as experimental
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            return samplers.TPESampler(seed=seed, n_startup_trials=n_startup, multivariate=True, constant_liar=many)

    def is_pruned(self, proposal: Proposal, value: float, n_documents: int) -> bool:
        """Whether settings with this value on so many documents are not worth more of them."""
        proposal.trial.report(value, n_documents)
        return bool(proposal.trial.should_prune())

    def tell(self, proposal: Proposal, trial: Trial, key: str | None) -> None:
        """Store what came of a proposal."""
        about = {"key": key, "reason": trial.reason, "seconds": trial.seconds}
        self.finish(proposal, trial, {**trial.figures, **{OURS + name: about[name] for name in about if about[name]}})

    def tell_same(self, proposal: Proposal, earlier: Trial) -> None:
        """Store that these settings are those of an earlier trial, for the sampler to learn from."""
        self.finish(proposal, earlier, {OURS + "same_as": earlier.number})

    def finish(self, proposal: Proposal, trial: Trial, attributes: dict[str, Any]) -> None:
        """Attributes first, so that a finished trial has them."""
        for name, value in attributes.items():
            proposal.trial.set_user_attr(name, value)
        state = next(theirs for theirs, ours in STATES.items() if ours == trial.state)
        value = trial.value if trial.state == "complete" else None
        self.study.tell(proposal.number, value, state=self.optuna.trial.TrialState[state])

    def is_exhausted(self) -> bool:
        """Whether every combination has been proposed."""
        return not self.unfinished and len(self.points) == self.n_points


def point(params: Params) -> str:
    """Settings as one text."""
    return json.dumps(spaces.decoded(params), sort_keys=True)


def in_words(distributions: Mapping[str, Distribution]) -> dict[str, Any]:
    """What identifies a space, as JSON can hold it."""
    to_json = needs("optuna", "tune").distributions.distribution_to_json
    return {name: json.loads(to_json(each))["attributes"] for name, each in distributions.items()}


def suggested(trial: Optuna, name: str, distribution: Distribution) -> Any:
    """The value of a setting in this trial, as Optuna stores it."""
    if hasattr(distribution, "choices"):
        return trial.suggest_categorical(name, distribution.choices)
    low, high, step, is_log = distribution.low, distribution.high, distribution.step, distribution.log
    suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    return suggest(name, low, high, step=step, log=is_log)


@contextmanager
def proposing(study: Optuna, sampler: Optuna) -> Iterator[None]:
    """One trial is drawn by this sampler. It is not there when the trial is told: GridSampler would then stop a loop
    of Optuna's that there is not."""
    resting, study.sampler = study.sampler, sampler
    try:
        yield
    finally:
        study.sampler = resting


# -- what mattered ----------------------------------------------------------------------------------------------------


def importances(path: Path) -> dict[str, float]:
    """Share of each setting in how the values of the complete trials differ, highest first, by fANOVA (Hutter et al.,
    2014); nothing where that cannot be told."""
    optuna = needs("optuna", "tune")
    with explained(path), quiet(), connected(path) as file:
        study = optuna.load_study(study_name=None, storage=file)
        done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
        varied = [name for name in (done[0].params if done else {}) if len({trial.params[name] for trial in done}) > 1]
        if len(done) < FEW or len(varied) < 2 or len({trial.value for trial in done}) == 1:
            return {}
        judge = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=judge, params=varied)
    return {name: float(share) for name, share in found.items()}
