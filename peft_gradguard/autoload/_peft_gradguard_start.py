"""What runs at the start of an interpreter whose environment says ``PEFT_GRADGUARD=1``: it waits for ``import peft``.

Neither the package nor wrapt is imported here, only when PEFT is: a program that never imports PEFT pays for this file
alone, and nothing depends on ``sys.path`` being complete, which it is not while ``.pth`` files are read.

The wheel places this file at the top of site-packages, where the ``.pth`` or ``.start`` file finds it: outside of the
package, because to import anything inside of it switches the guard on.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

# The words of peft_gradguard.settings, which cannot be imported here. A test holds them (and the .pth line) together.
SWITCH = "PEFT_GRADGUARD"
ON = ("1", "true", "yes", "on")
OFF = ("0", "false", "no", "off")

ways: "list[str]" = []
"""Which start-up files have acted in this interpreter; for ``peft-gradguard status``."""

warned_of: "str | None" = None
"""The value that was warned of, so that ``peft_gradguard.settings`` need not repeat it."""

chained: "set[str]" = set()
"""The files that our ``sitecustomize`` has run. Kept here because another one in the chain may run ours again."""


package: "str | None" = None
"""The folder of the package that our ``sitecustomize`` lies in; for where the package is not on ``sys.path``."""


def start(way: str = ".start") -> None:
    """Wait for ``import peft`` where ``PEFT_GRADGUARD`` is on. Idempotent: a ``.pth`` can be run twice."""
    value = os.environ.get(SWITCH, "").strip().lower()
    if value in ON:
        if not ways:
            _wait_for_peft()
        if way not in ways:
            ways.append(way)
    elif value and value not in OFF:
        _warn_of(os.environ[SWITCH])


def say(message: str) -> None:
    """Write one line to stderr, if there is one."""
    # A program without a console has none, or a closed one, or something else in its place.
    try:
        print(f"peft_gradguard: {message}", file=sys.stderr)
    except Exception:
        return


class PeftIsComing:
    """A finder that finds nothing, but sees ``import peft`` go by and loads the guard first.

    Other tools' finders may stand first and find PEFT before anybody else is asked. So it also looks at any other
    import, and at any folder that Python looks into for the first time, and puts itself first again: at most a few
    times, as another one may do the same. It stays in ``sys.meta_path`` afterwards, with its repetitions: to remove it
    while Python goes through the list would skip another finder.
    """

    done = loading = False

    def find_spec(self, name: str, path: "Sequence[str] | None" = None, target: object = None) -> None:
        """Load the guard where ``name`` is PEFT's, or PEFT is there; the finders after this one do the finding."""
        if not self.done:
            self.look(name)

    def see_folder(self, folder: str) -> "NoReturn":
        """Look, and leave the folder to the other hooks on paths."""
        if not self.done:
            self.look("")
        raise ImportError(folder)

    def look(self, name: str) -> None:
        """Load the guard if it is time."""
        if name != "peft" and "peft" not in sys.modules:
            if sys.meta_path[0] is not self and sys.meta_path.count(self) < 20:
                sys.meta_path.insert(0, self)
        elif not self.loading:
            self.loading = True
            load_guard()
            # Not before: another thread that imports PEFT meanwhile has to wait until the guard is there.
            self.done = True


def load_guard() -> None:
    """Import the package, which switches the guard on. Whatever goes wrong, the program goes on, with one line said."""
    try:
        try:
            import peft_gradguard  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "peft_gradguard" or not _import_package_of_sitecustomize():
                raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"{SWITCH} is on, but the guard could not be loaded, so AdaLoRA runs unguarded ({reason})")


def _wait_for_peft() -> None:
    if "peft" in sys.modules:
        load_guard()
    else:
        # The first finder is asked first, even for a PEFT that another tool's finder would provide.
        finder = PeftIsComing()
        sys.meta_path.insert(0, finder)
        sys.path_hooks.insert(0, finder.see_folder)


def _import_package_of_sitecustomize() -> bool:
    """Import ``peft_gradguard`` from where our ``sitecustomize`` lies, and nothing else from there; say whether it was.

    For a child process of ``peft-gradguard run`` in another environment, which has PEFT and wrapt, but not the guard.
    Its folder on ``sys.path`` would bring in everything else that is installed beside it.
    """
    if package is None:
        return False
    from importlib.util import module_from_spec, spec_from_file_location

    init = os.path.join(package, "__init__.py")
    spec = spec_from_file_location("peft_gradguard", init, submodule_search_locations=[package])
    if spec is None or spec.loader is None:
        return False
    sys.modules["peft_gradguard"] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["peft_gradguard"]
        raise
    return True


def _warn_of(value: str) -> None:
    global warned_of
    if warned_of is None:
        warned_of = value
        import warnings

        message = (
            f"{SWITCH}={value!r} is not understood, so peft_gradguard does not load by itself: set it to one of "
            f"{', '.join(ON)} (guard on) or {', '.join(OFF)} (guard off), in any case."
        )
        try:
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        # It may be an error here, or somebody's way to show it fails.
        except Exception:
            say(message)
