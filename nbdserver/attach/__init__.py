"""Attach an export to this machine's kernel as /dev/nbdN, and keep it attached while the server restarts or moves.

Only the standard library and no other module of ours: it also runs in an initramfs, as `python3 -m nbdserver.attach`,
where `nbdserver/__init__.py` and this folder are all that there is.

The kernel does the reading and writing. We open the connections, shake hands, and hand the sockets over (netlink.py;
`nbd-client` can neither connect again nor name the disk). Then an agent stays (agent.py): when the kernel says that a
connection is dead, it opens another one and hands that over, and what was under way is sent again after
`timeout_seconds`. Meanwhile whoever uses the device waits, at most `dead_seconds`; then it gets errors.

The export's identity (PROTOCOL.md, "Which disk it is") is the device's backend identifier. If it is another one when we
connect again, acknowledged writes may be lost or it is another disk: the kernel must not go on as if nothing had been.
The agent disconnects the device, so that its users see errors, and ends.
"""
