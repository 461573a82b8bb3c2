"""A plugin for mypy. It says what mypy does not see of deployments and handles by itself:

- a class under `@serve.deployment` has `bind`, `options` and the rest (mypy ignores what a class decorator returns,
  python/mypy#3135), and `bind` takes what the constructor takes, with nodes in place of handles;
- `handle.method` is a handle of that method, and the class must have it;
- `remote`, `call` and `stream` take what the method takes, each argument as a value, a ref or an un-awaited call.

Turned on by `plugins = ["millstream.mypy_plugin"]` in the section `[tool.mypy]` of pyproject.toml.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

from mypy.nodes import GDEF, CallExpr, Context, Decorator, MemberExpr, NameExpr, TempNode, TypeInfo
from mypy.plugin import AttributeContext, CheckerPluginInterface, ClassDefContext, MethodSigContext, Plugin
from mypy.type_visitor import TypeTranslator
from mypy.types import (
    AnyType,
    CallableType,
    FunctionLike,
    Instance,
    Overloaded,
    ParamSpecType,
    Type,
    TypeAliasType,
    TypeOfAny,
    UninhabitedType,
    UnionType,
    UnpackType,
)
from mypy.types import get_proper_type as proper

DECORATOR = "millstream.deployment.deployment"
METACLASS = "millstream.deployment.DecoratedClass"
APPLICATION = "millstream.deployment.Application"
BATCHED = "millstream.replicas.batching.Batched"
OBJECT_REF = "millstream.handles.ref.ObjectRef"
REF_TASK = "millstream.handles.arguments.RefTask"
DEPLOYMENT_HANDLE = "millstream.handles.handle.DeploymentHandle"
HANDLES = {
    f"millstream.handles.handle.{name}" for name in ("DeploymentHandle", "SyncHandle", "_Streaming", "_SyncStreaming")
}
LISTS = ("builtins.list", "typing.Sequence", "typing.Collection", "typing.Iterable")


def plugin(_: str) -> type[Plugin]:
    """What mypy asks this module for."""
    return MillstreamPlugin


class MillstreamPlugin(Plugin):
    def get_class_decorator_hook_2(self, fullname: str) -> Callable[[ClassDefContext], bool] | None:
        return make_deployment if fullname == DECORATOR else None

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        owner, _, name = fullname.rpartition(".")
        return partial(handle_of_method, name) if owner in HANDLES else None

    def get_method_signature_hook(self, fullname: str) -> Callable[[MethodSigContext], FunctionLike] | None:
        owner, _, name = fullname.rpartition(".")
        if owner in HANDLES and name in ("remote", "call", "stream", "map"):
            return partial(self.check_request, name)
        return self.check_bind if name == "bind" else None

    def instance(self, fullname: str, argument: Type) -> Instance:
        found = self.lookup_fully_qualified(fullname)
        assert found is not None and isinstance(found.node, TypeInfo)
        return Instance(found.node, [argument])

    # requests

    def check_request(self, name: str, ctx: MethodSigContext) -> FunctionLike:
        handle, default = proper(ctx.type), ctx.default_signature
        called = called_by(ctx.api, handle, ctx.context) if isinstance(handle, Instance) else None
        if called is None:
            return default
        if called.variables:
            return default.accept(_AnyForNever())  # type: ignore[return-value]
        if name != "map" and is_simple(called) and isinstance(ctx.context, CallExpr):
            self.check_arguments(called, ctx.context, ctx)
        return default

    def check_arguments(self, called: CallableType, call: CallExpr, ctx: MethodSigContext) -> None:
        """Have mypy check this call as one of the method, with a ref or an un-awaited call in place of any argument.

        Not by what it asks for here, a signature: that is one of several overloads, and if the arguments were wrong for all
        of them, mypy would list these, and not say what is wrong.
        """
        types = [UnionType([t, self.instance(OBJECT_REF, t), self.instance(REF_TASK, t)]) for t in called.arg_types]
        expected = called.copy_modified(arg_types=types, name=ctx.default_signature.name)
        check = CallExpr(TempNode(expected), call.args, call.arg_kinds, call.arg_names)
        check.set_line(call)
        ctx.api.get_expression_type(check)

    # nodes

    def check_bind(self, ctx: MethodSigContext) -> FunctionLike:
        default, made = ctx.default_signature, proper(ctx.default_signature.ret_type)
        if not is_instance_of(made, APPLICATION):
            return default  # somebody else's `bind`
        bound = proper(made.args[0])
        constructor = class_object(ctx.api, bound.type, ctx.context) if isinstance(bound, Instance) else bound
        if not isinstance(constructor, CallableType) or constructor.variables or constructor.unpack_kwargs:
            return default
        if not constructor.is_type_obj():
            return default.copy_modified(arg_types=[], arg_kinds=[], arg_names=[])  # a function
        types = [self.with_nodes(one) for one in constructor.arg_types]
        return default.copy_modified(arg_types=types, arg_kinds=constructor.arg_kinds, arg_names=constructor.arg_names)

    def with_nodes(self, parameter: Type) -> Type:
        """What `bind` takes for a parameter. Where a handle is wanted, a node becomes one, at any depth."""
        kind = proper(parameter)
        if isinstance(kind, UnionType):
            return UnionType([self.with_nodes(item) for item in kind.items])
        if is_instance_of(kind, DEPLOYMENT_HANDLE):
            return UnionType([kind, self.instance(APPLICATION, kind.args[0])])
        may_hold_nodes = DEPLOYMENT_HANDLE in str(kind) or (isinstance(kind, Instance) and kind.type.is_protocol)
        return AnyType(TypeOfAny.special_form) if may_hold_nodes else parameter


def make_deployment(ctx: ClassDefContext) -> bool:
    """Give a decorated class the metaclass `DecoratedClass[itself]`, so that it is to mypy what it is at run time."""
    info = ctx.cls.info
    itself = Instance(info, [AnyType(TypeOfAny.special_form) for _ in info.defn.type_vars])
    info.metaclass_type = ctx.api.named_type_or_none(METACLASS, [itself])
    return info.metaclass_type is not None  # False: ask again, when more is known


def handle_of_method(name: str, ctx: AttributeContext) -> Type:
    handle, default = proper(ctx.type), proper(ctx.default_attr_type)
    if not isinstance(handle, Instance) or not handle.args or not isinstance(default, Instance):
        return default
    found = method(ctx.api, handle.args[0], name, ctx.context)
    # Of overloads, only the first would be seen.
    return default if isinstance(found, Overloaded) else default.copy_modified(args=[found])


def called_by(api: CheckerPluginInterface, handle: Instance, at: Context) -> CallableType | None:
    """The function or method that a handle calls. None if that is not known, or has overloads."""
    target = proper(handle.args[0])
    called = method(api, target, "__call__", at) if isinstance(target, Instance) else target
    return called if isinstance(called, CallableType) else None


def is_simple(called: CallableType) -> bool:
    """Has it annotations, and parameters that each stand for themselves?"""
    stands_for_several = any(isinstance(proper(one), ParamSpecType | UnpackType) for one in called.arg_types)
    return not (called.implicit or called.unpack_kwargs or stands_for_several)


class _AnyForNever(TypeTranslator):
    """For methods with type variables of their own: of what these return, mypy's overloads make Never."""

    def visit_uninhabited_type(self, _: UninhabitedType) -> Type:
        return AnyType(TypeOfAny.special_form)

    def visit_type_alias_type(self, alias: TypeAliasType) -> Type:
        return proper(alias).accept(self)


def method(api: CheckerPluginInterface, owner: Type, name: str, at: Context) -> Type:
    """The type of `owner.name`. Mypy reports it if there is no such attribute."""
    expression = MemberExpr(TempNode(owner), name)
    expression.set_line(at)
    found = proper(api.get_expression_type(expression))
    return with_values(proper(owner), name, found) if is_instance_of(found, BATCHED) else found


def with_values(owner: Type, name: str, batched: Instance) -> Type:
    """A method under `serve.batch` as its callers see it: with values where the function under the decorator has lists."""
    symbol = owner.type.get(name) if isinstance(owner, Instance) and not owner.args else None
    function = symbol.node.func.type if symbol is not None and isinstance(symbol.node, Decorator) else None
    if not isinstance(function, CallableType):
        return batched
    return function.copy_modified(
        arg_types=[item_of(one) for one in function.arg_types[1:]],
        arg_kinds=function.arg_kinds[1:],
        arg_names=function.arg_names[1:],
        ret_type=batched.args[0],
    )


def item_of(parameter: Type) -> Type:
    kind = proper(parameter)
    return kind.args[0] if is_instance_of(kind, *LISTS) else AnyType(TypeOfAny.special_form)


def is_instance_of(kind: Type, *names: str) -> TypeGuard[Instance]:
    return isinstance(kind, Instance) and kind.type.fullname in names


def class_object(api: CheckerPluginInterface, info: TypeInfo, at: Context) -> Type:
    """The type of the class itself: a function that takes what its constructor takes."""
    expression = NameExpr(info.name)
    expression.kind, expression.node, expression.fullname = GDEF, info, info.fullname
    expression.set_line(at)
    return proper(api.get_expression_type(expression))
