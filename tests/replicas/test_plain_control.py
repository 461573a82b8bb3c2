"""The warm parent's end of its socket to the launcher."""

import socket

from millstream.replicas.control import PlainControl


def test_launcher_that_leaves_without_reading_is_gone_and_no_error() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        control = PlainControl(theirs)
        control.send({"forked": 1})

        ours.close()  # with our words unread: the kernel resets the connection

        assert control.receive() is None
        control.send({"ended": 1})
