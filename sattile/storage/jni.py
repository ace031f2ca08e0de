"""Java called from Python in a process that has a JVM already, by JNI and ctypes: no compiler, no further package.

https://docs.oracle.com/en/java/javase/17/docs/specs/jni/functions.html; the numbers are its indices into the table.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_void_p
from functools import partial
from typing import Any

RESULTS: dict[str, tuple[int, Any]] = {
    "L": (36, c_void_p), "[": (36, c_void_p), "Z": (39, c_uint8), "J": (54, c_int64), "V": (63, None),
}  # fmt: skip
"""Call...MethodA and its result by the first letter of a signature's result."""

JNI_VERSION = 0x00010008
UTF_16 = f"utf-16-{sys.byteorder[0]}e"

_methods: dict[str, tuple[int, int]] = {}
"""(class, method id) by name: both hold for the life of the JVM."""


class JavaError(Exception):
    """A Java exception.

    Attributes:
        kind: name of its class, without the package.
        text: its message.
    """

    def __init__(self, description: str):
        # A RemoteException is the NameNode's own one, wrapped: RemoteException(org.apache...X): message
        match = re.match(r"(?:[\w.$]+\()?(?:[\w$]+\.)*([\w$]+)\)?(?::\s*(.*))?", description, re.DOTALL)
        self.kind, self.text = (match.group(1), match.group(2) or "") if match else ("", description)
        super().__init__(description)


@contextmanager
def java() -> Iterator[Java]:
    """This thread's way into the JVM. What Java returns inside is a number, and holds until the end of it."""
    machine, env = _machine(), c_void_p()
    version = c_int32(JNI_VERSION)
    attached = _function(machine, 6, c_int32, c_void_p, c_int32)(ctypes.addressof(env), version) != 0  # GetEnv
    if attached:
        attach = _function(machine, 7, c_int32, c_void_p, c_void_p)  # AttachCurrentThreadAsDaemon
        if attach(ctypes.addressof(env), None) != 0:
            raise RuntimeError("the JVM takes no further thread")
    try:
        found = Java(env)
        with found.frame():
            yield found
    finally:
        if attached:  # else Java would keep what this thread leaves
            _function(machine, 5, c_int32)()


def _machine() -> c_void_p:
    machine, count = c_void_p(), c_int32()
    library = ctypes.CDLL("libjvm.so")  # by its name alone: the one that was loaded before
    library.JNI_GetCreatedJavaVMs(ctypes.byref(machine), c_int32(1), ctypes.byref(count))
    if not count.value:
        raise RuntimeError("there is no JVM in this process")
    return machine


def _function(owner: c_void_p, index: int, result: Any, *types: Any) -> Callable[..., Any]:
    """A function of the table to which the first word of `owner` points; `owner` is its first argument."""
    address = ctypes.cast(owner, ctypes.POINTER(ctypes.POINTER(c_void_p)))[0][index]
    assert address is not None
    return partial(ctypes.CFUNCTYPE(result, c_void_p, *types)(address), owner)


class Java:
    """Java in one thread; see `java`. A method is written `package/Class.name(arguments)result`, as JNI has them."""

    def __init__(self, env: c_void_p):
        self._env = env
        self._functions: dict[tuple[int, Any], Callable[..., Any]] = {}

    def call(self, method: str, target: int, *args: int) -> Any:
        """Call a method of an object.

        Raises:
            JavaError: what it throws; so do all methods here.
        """
        index, result = RESULTS[method[method.index(")") + 1]]
        _, number = self._method(method, 33)  # GetMethodID
        return self._checked(index, result, target, number, _values(args))

    def static(self, method: str, *args: int) -> int:
        """Call a static method that returns an object."""
        return int(self._checked(116, c_void_p, *self._method(method, 113), _values(args)))

    def new(self, method: str, *args: int) -> int:
        """Make an object; the method is `package/Class.<init>(arguments)V`."""
        return int(self._checked(30, c_void_p, *self._method(method, 33), _values(args)))

    def array(self, kind: str, *values: int) -> int:
        """An array with objects of a class in it."""
        array = self._checked(172, c_void_p, c_int32(len(values)), self._class(kind), 0)
        for index, value in enumerate(values):
            self._checked(174, None, array, c_int32(index), value)
        return int(array)

    def elements(self, array: int) -> Iterator[int]:
        """The objects of an array; each holds until the next."""
        for index in range(self._do(171, c_int32, array)):
            with self.frame():
                yield int(self._checked(173, c_void_p, array, c_int32(index)))

    def string(self, text: str) -> int:
        """A Java string, whatever is in it: JNI's own way from UTF-8 ends at the plane that holds no emoji."""
        units = text.encode(UTF_16, "surrogatepass")
        return int(self._checked(163, c_void_p, _address(units), c_int32(len(units) // 2)))

    def text(self, string: int) -> str:
        length = self._do(164, c_int32, string)
        units = (c_uint16 * length)()
        self._do(220, None, string, c_int32(0), c_int32(length), ctypes.addressof(units))
        return bytes(units).decode(UTF_16, "surrogatepass")

    def keep(self, target: int) -> int:
        """The same object, to be used in other threads and for as long as the JVM lives."""
        return int(self._do(21, c_void_p, target))

    @contextmanager
    def frame(self) -> Iterator[None]:
        """What Java returns inside is given up at the end."""
        self._do(19, c_int32, c_int32(16))
        try:
            yield
        finally:
            self._do(20, c_void_p, 0)

    def _method(self, method: str, finder: int) -> tuple[int, int]:
        found = _methods.get(method)
        if found is None:
            kind, _, rest = method.partition(".")
            name, _, signature = rest.partition("(")
            owner = self.keep(self._class(kind))
            number = self._checked(finder, c_void_p, owner, name.encode(), f"({signature}".encode())
            found = _methods[method] = owner, int(number)
        return found

    def _class(self, kind: str) -> int:
        return int(self._checked(6, c_void_p, kind.encode()))

    def _checked(self, index: int, result: Any, *args: Any) -> Any:
        answer = self._do(index, result, *args)
        thrown = self._do(15, c_void_p)
        if thrown:
            self._do(17, None)
            raise JavaError(self.text(self.call("java/lang/Object.toString()Ljava/lang/String;", thrown)))
        return answer

    def _do(self, index: int, result: Any, *args: Any) -> Any:
        """Call a function of JNI: numbers and None are pointers, bytes are a C string."""
        key = index, result
        function = self._functions.get(key)
        if function is None:
            types = [c_char_p if isinstance(one, bytes) else type(one) if isinstance(one, c_int32) else c_void_p
                     for one in args]  # fmt: skip
            function = self._functions[key] = _function(self._env, index, result, *types)
        return function(*args)


def _values(args: tuple[int, ...]) -> Any:
    """An array of `jvalue`: eight bytes each."""
    return ctypes.cast((c_int64 * (len(args) or 1))(*args), c_void_p)


def _address(data: bytes) -> Any:
    return ctypes.cast(ctypes.c_char_p(data), c_void_p)
