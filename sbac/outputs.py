"""Where the log of a model goes: its logger, the table of `verbose`, and the event files of `tensorboard_log`."""

from __future__ import annotations

from pathlib import Path

from sbac.logger import HumanOutputFormat, Logger, TensorBoardOutputFormat


class Outputs:
    """A model's logger, and what the model's arguments add to it.

    Attributes:
        logger: What the user set, or one without outputs.
        folder: Of the run's event file, below `tensorboard_log`; None before there is one.
    """

    def __init__(self) -> None:
        self.logger = Logger(None, [])
        self.folder: str | None = None
        self._run = ""
        self._event_file: TensorBoardOutputFormat | None = None

    def resume(self, run: str, folder: str | None) -> None:
        """Take over the name and the folder of a run that was stopped: `open` goes on with them."""
        self._run, self.folder = run, folder

    def open(self, run: str, is_new: bool, verbose: int, tensorboard_log: str | None) -> None:
        """Add the outputs that are missing; a new run, or one of another name, has event files in a new folder.

        Args:
            run: Its name.
            is_new: Whether it begins, or goes on.
            verbose: From 1 on, there is a table in the terminal.
            tensorboard_log: Where the runs' folders of event files are, or None.
        """
        outputs = self.logger.output_formats
        is_other_folder = is_new or run != self._run
        if self._event_file in outputs and is_other_folder:
            outputs.remove(self._event_file)
            self._event_file.close()
        self._run = run
        kinds = {type(output) for output in outputs}
        if verbose >= 1 and HumanOutputFormat not in kinds:
            self.logger.add_output(HumanOutputFormat())
        if tensorboard_log is not None and TensorBoardOutputFormat not in kinds:
            if is_other_folder or self.folder is None:
                self.folder = _run_folder(Path(tensorboard_log), run, is_new)
            self._event_file = TensorBoardOutputFormat(Path(tensorboard_log, self.folder))
            self.logger.add_output(self._event_file)


def _run_folder(parent: Path, run: str, is_new: bool) -> str:
    """`run_1`, `run_2`, ...: a new one for a new run, the newest to go on with."""
    numbers = [
        int(folder.name.removeprefix(f"{run}_"))
        for folder in parent.glob(f"{run}_*")
        if folder.name.removeprefix(f"{run}_").isdigit()
    ]
    newest = max(numbers, default=0)
    return f"{run}_{newest + 1 if is_new or not newest else newest}"
