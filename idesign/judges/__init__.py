"""Judges: does what an update does to a concept serve the written objective?"""

from idesign.judges.contrastive import ContrastiveJudge
from idesign.judges.endpoint import (
  ChatEndpoint,
  Complete,
  Completion,
  EndpointError,
)
from idesign.judges.evidence import ConceptInspector, evidence
from idesign.judges.language_model import Inspector, LanguageModelJudge
from idesign.judges.log import (
  DecisionLog,
  LogError,
  ReplayJudge,
  read_log,
  recorded,
)
from idesign.judges.objective import (
  Clause,
  Decision,
  Objective,
  ObjectiveError,
  load_objective,
  make_objective,
)
from idesign.judges.separation import Contrast, contrast
from idesign.judges.verdict import Evidence, Judge, Verdict, gates
