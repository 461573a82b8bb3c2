"""Users of a server with the rights that docs/keyspace.md gives them, or fewer."""

from typing import Any

from tests.docs import pages
from tests.servers import Server

PASSWORD = "a-password"
UNKNOWN_TO = {"redis7": {"+client|setinfo"}}


def rule_of(user: str) -> list[str]:
    """The words after ACL of what makes this user, as the page has them."""
    (rule,) = [block.text for block in pages.blocks(pages.KEYSPACE, "text") if f"SETUSER {user} " in block.text]
    return rule.replace("<password>", PASSWORD).split()[1:]


def make_user(server: Server, user: str, *without: str) -> str:
    """Make a user of the page, some of its rights left out; the URL to use."""
    left_out = {*without, *UNKNOWN_TO.get(server.name, ())}
    words = [word for word in rule_of(user) if word not in left_out]
    with server.connect_blocking() as client:
        client.execute_command("ACL", *words[:2], "reset", *words[2:])
    return f"redis://{user}:{PASSWORD}@127.0.0.1:{server.port}"


def refused(client: Any) -> list[str]:
    """What the server has refused to anybody, since it was last asked for that."""
    rows = client.execute_command("ACL", "LOG")
    client.execute_command("ACL", "LOG", "RESET")
    return [f"{row['username']}: {row['reason']} {row['object']} ({row['context']})" for row in rows]
