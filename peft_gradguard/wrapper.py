"""What is wrapped, and by what: the six methods of ``RankAllocator``, and how the guard's wrapper is recognised."""

from __future__ import annotations

import inspect
from contextlib import suppress
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import wrapt

from .switch import is_enabled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import ModuleType

    from peft.tuners.adalora import RankAllocator

TARGET = "peft.tuners.adalora"

METHODS: dict[str, tuple[str, ...]] = {
    "update_ipt": ("self", "model"),
    "update_and_allocate": ("self", "model", "global_step", "force_mask"),
    "budget_schedule": ("self", "step"),
    "mask_to_budget": ("self", "model", "budget"),
    "mask_using_rank_pattern": ("self", "model", "rank_pattern"),
    "_set_budget_scheduler": ("self", "model"),
}
"""The wrapped methods of ``RankAllocator`` and the arguments that they have had in every release since 0.3."""

LOADING: dict[str, tuple[str, ...]] = {
    "resize_modules_by_rank_pattern": ("self", "rank_pattern", "adapter_name"),
    "resize_state_dict_by_rank_pattern": ("self", "rank_pattern", "state_dict", "adapter_name"),
    "_load_from_state_dict": (
        "self",
        "state_dict",
        "prefix",
        "local_metadata",
        "strict",
        "missing",
        "unexpected",
        "errors",
    ),
}
"""The wrapped methods of ``AdaLoraModel``: what PEFT and torch call where an adapter is saved and loaded."""

DEEPEST = 100
"""So many wrappers are looked beneath: some objects (``mock.call``) answer to ``__wrapped__`` for ever."""


class GuardWrapper(wrapt.FunctionWrapper):  # type: ignore[misc, type-arg, unused-ignore]
    """The guard's own wrapper, so that it can be told from anybody else's. It binds, copies and pickles as a function.

    ``wrapt`` would bind it to an object of its own, which cannot be copied or pickled, and knows no ``self=``.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # Not the function's, which torch.compile would take it for.
        return GuardWrapper

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __copy__(self) -> GuardWrapper:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardWrapper:
        return self

    def __reduce_ex__(self, protocol: Any) -> str:
        return str(self.__qualname__)


def wrap(owner: type, name: str, guarded: Callable[..., Any], expected: tuple[str, ...]) -> None:
    """Wrap one method of a class, once, by ``guarded(peft, instance, /, ...)``.

    Python binds the call's arguments to ``guarded``'s parameters, which are named as ``expected``. ``peft(...)`` calls
    what is wrapped, with the arguments as the caller gave them, but for the first ones, which ``peft`` may be given.
    """
    if is_guarded(vars(owner).get(name)):
        return
    if name not in vars(owner):
        setattr(owner, name, _inherited(owner, name))
    while _is_of_an_earlier_import(vars(owner)[name]):
        setattr(owner, name, vars(owner)[name].__wrapped__)
    signature = inspect.signature(vars(owner)[name])
    named = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] or list(expected)

    def wrapper(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args and named[0] not in kwargs:
            return wrapped(*args, **kwargs)
        kwargs = dict(kwargs)
        instance, args = (args[0], args[1:]) if args else (kwargs.pop(named[0]), args)
        # Bound, as somebody else's wrapper beneath may ask for the instance.
        bound = wrapped.__get__(instance, type(instance))
        if not is_enabled() or not issubclass(type(instance), owner):
            return bound(*args, **kwargs)
        try:
            given = signature.bind(instance, *args, **kwargs)
        except TypeError:
            # They do not fit, and the method itself says so.
            return bound(*args, **kwargs)

        def peft(*changed: Any) -> Any:
            count = len(args)
            by_name = dict(zip(named[1:][count:], changed[count:], strict=False))
            return bound(*changed[:count], *args[len(changed) :], **{**kwargs, **by_name})

        return guarded(peft, instance, *given.args[1:], **given.kwargs)

    wrapt.wrap_object(owner, name, GuardWrapper, (wrapper,))


def _is_of_an_earlier_import(method: Any) -> bool:
    """Say whether this is the wrapper of a package that has been imported anew since, and is out of reach."""
    kind = type(method)
    names = (kind.__module__, kind.__qualname__), (GuardWrapper.__module__, GuardWrapper.__qualname__)
    return kind is not GuardWrapper and names[0] == names[1]


def _inherited(owner: type, name: str) -> Callable[..., Any]:
    """Return a method that does what the class inherits under this name, also where that is replaced later."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(owner, self), name)(*args, **kwargs)

    inherited = getattr(owner, name)
    method.__signature__ = inspect.signature(inherited)  # type: ignore[attr-defined]
    for attribute in ("__module__", "__doc__", "__name__"):
        setattr(method, attribute, getattr(inherited, attribute))
    method.__qualname__ = f"{owner.__qualname__}.{name}"
    return method


def mismatch(
    module: ModuleType, class_name: str = "RankAllocator", methods: dict[str, tuple[str, ...]] = METHODS
) -> str | None:
    """Return in words what about this ``peft.tuners.adalora`` does not fit the guard, or None where all does."""
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        return f"{module.__name__} has no class {class_name}"
    for name, expected in methods.items():
        method = inspect.getattr_static(found, name, None)
        if not callable(method):
            return f"{class_name} has no method {name}"
        try:
            inspect.signature(method).bind(*expected)
        except TypeError:
            return f"{class_name}.{name}{inspect.signature(method)} does not take ({', '.join(expected)})"
    return None


def is_guarded(method: Any) -> bool:
    """Say whether the guard's wrapper is in this chain of wrappers, at the top or beneath somebody else's."""
    for _ in range(DEEPEST):
        # Not isinstance: a wrapt proxy answers with the class of what it wraps.
        if type(method) is MethodType:
            method = method.__func__
        if type(method) is GuardWrapper:
            return True
        try:
            method = method.__wrapped__
        except Exception:
            # Mostly there is none; and a proxy may raise whatever it likes.
            return False
    return False


def is_own(allocator: RankAllocator, name: str) -> bool:
    """Say whether a call of this method reaches the guard first: not so for one assigned later, or overridden."""
    return is_guarded(_found_first(allocator, name))


def is_undisturbed(allocator: RankAllocator, name: str) -> bool:
    """Say whether a call of this method meets the guard and PEFT's code only: nobody else overrides or wraps it."""
    return undisturbed(allocator, name) is not None


def undisturbed(allocator: RankAllocator, name: str) -> FunctionType | None:
    """Return PEFT's function, where a call of this method meets the guard and it only."""
    found = _found_first(allocator, name)
    # What functools.wraps makes has the module's name of what it wraps, but not its globals.
    wrapped: Any = found.__wrapped__ if type(found) is GuardWrapper else None
    return wrapped if _is_pefts(wrapped) else None


def is_pefts(allocator: RankAllocator, *names: str) -> bool:
    """Say whether these methods, which the guard may not wrap, are as PEFT wrote them."""
    found = (_found_first(allocator, name) for name in names)
    return all(_is_pefts(_beneath(method)) for method in found)


def scores_by_gradients(allocator: RankAllocator) -> bool:
    """Say whether its ``update_ipt`` reads gradients or calls the guarded one: itself, or in a function that it calls.

    PEFT's method does; a subclass may score by something else, and then needs none, and so may what somebody has put in
    PEFT's place before the guard came. True where that cannot be seen.
    """
    found, seen = [_beneath(_found_first(allocator, "update_ipt"))], {"super"}
    if not isinstance(found[0], FunctionType | MethodType):
        return True
    for _ in range(3):
        if any(map(is_guarded, found)):
            return True
        functions = [function.__func__ if type(function) is MethodType else function for function in found]
        found = []
        for function in (function for function in functions if type(function) is FunctionType):
            names = _names_in(function)
            if names & {"grad", "safe_get_full_grad", "update_ipt"}:
                return True
            found += [_found_first(allocator, used) for used in names - seen] + _known_to(function, names - seen)
            seen |= names
    return False


def cannot_do_without_gradients(allocator: RankAllocator) -> bool:
    """Say whether what the guard wraps as ``update_ipt`` is PEFT's, and not somebody's who passes over parameters."""
    methods = (vars(kind).get("update_ipt") for kind in type(allocator).__mro__)
    return any(type(method) is GuardWrapper and _is_pefts(method.__wrapped__) for method in methods)


def leads_to_guard(method: Any) -> bool:
    """Say whether this is the guard's wrapper, is around it, or is a function or a ``partial`` that may call it."""
    function = getattr(method, "func", method)
    function = function.__func__ if type(function) is MethodType else function
    known = _known_to(function, _names_in(function)) if type(function) is FunctionType else []
    return any(map(is_guarded, [method, function, *known]))


def _names_in(function: FunctionType) -> set[str]:
    return {used for code in _codes(function.__code__) for used in code.co_names}


def _known_to(function: FunctionType, names: Iterable[str]) -> list[Any]:
    """Return what a function finds under these names among its globals, in its closure, and as default arguments."""
    known = [*map(function.__globals__.get, names), *(function.__defaults__ or ())]
    known += (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        # It is empty where the variable was deleted.
        with suppress(ValueError):
            known.append(cell.cell_contents)
    return known


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and those of the functions written inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _beneath(method: Any) -> Any:
    """Return what the guard wraps, or else the method itself."""
    return method.__wrapped__ if type(method) is GuardWrapper else method


def _is_pefts(method: Any) -> bool:
    return type(method) is FunctionType and str(method.__globals__["__name__"]).startswith(TARGET)


def _found_first(allocator: RankAllocator, name: str) -> Any:
    """Return what attribute look-up finds, unbound: an instance's own method before those of its classes."""
    for place in (allocator, *type(allocator).__mro__):
        if name in vars(place):
            return vars(place)[name]
    return None
