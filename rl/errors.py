"""One tree of exceptions: catch ``PosttrainError`` and nothing of ours escapes. Each message says what to do."""


class PosttrainError(Exception):
    """Anything a user can put right. The command line prints it as one line and exits with 2."""


class ConfigError(PosttrainError, ValueError):
    """A wrong key, value or combination in the configuration."""


class DataError(PosttrainError, ValueError):
    """A dataset that cannot be read, or rows that lack a column."""


class RewardError(PosttrainError):
    """A reward function that raised, or returned what is not a score; names the function and the sample."""


class CheckpointError(PosttrainError):
    """A run directory or checkpoint that is missing, incomplete or does not fit."""


class EngineError(PosttrainError):
    """A rollout engine or trainer that cannot do what the configuration asks on this machine."""


class OutOfMemory(EngineError):
    """The GPU's memory ran out; a smaller piece of the same work may fit."""


class ActorDied(EngineError):
    """The process of a sampler or trainer is gone; ``actor`` says which."""

    def __init__(self, message: str, actor: str) -> None:
        super().__init__(message)
        self.actor = actor
