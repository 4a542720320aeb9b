"""Everything that a command can be told, as dataclasses: the command line, YAML files and Python calls all make these.

Nothing here imports torch, so that `megaprompt --help` comes at once.
"""

from megaprompt.config.data import ConvertConfig, CountConfig, FetchConfig, VocabularyConfig
from megaprompt.config.machines import MemoryConfig, PlanConfig
from megaprompt.config.options import PASS_TOKENS, ROW_TOKENS, from_yaml, read_yaml, to_yaml
from megaprompt.config.probe import ProbeConfig
from megaprompt.config.run import RunConfig
from megaprompt.config.runs import AskConfig, EvaluateConfig, ExportConfig, ReportConfig, RerunConfig, StatusConfig
from megaprompt.config.shipped import AUTO, find_configuration, shipped_configurations
from megaprompt.config.superglue import SUPERGLUE_TASKS, SuperGlueConfig

__all__ = [
    "AUTO",
    "PASS_TOKENS",
    "ROW_TOKENS",
    "SUPERGLUE_TASKS",
    "AskConfig",
    "ConvertConfig",
    "CountConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FetchConfig",
    "MemoryConfig",
    "PlanConfig",
    "ProbeConfig",
    "ReportConfig",
    "RerunConfig",
    "RunConfig",
    "StatusConfig",
    "SuperGlueConfig",
    "VocabularyConfig",
    "find_configuration",
    "from_yaml",
    "read_yaml",
    "shipped_configurations",
    "to_yaml",
]
