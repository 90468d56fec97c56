"""What should be in the kernel: values in, values out.

Nothing in this package opens a socket, reads a clock or logs. `agent` imports it, never the
other way round. The way of a change runs through its modules in this order:

    objects -> selection -> frontends -> program -> slots -> diff -> nft | netlink

with `language` (the words rules are made of) and `tables` (the constant rules) beside it.
"""
