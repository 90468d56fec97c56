"""What should be in the kernel: values in, values out.

Nothing in this package opens a socket, reads a clock or logs. `agent` imports it, never the
other way round. A change passes through its modules in this order:

    objects -> selection -> frontends -> program -> slots -> diff -> transaction -> text | netlink

`language` is the model in which rules are written, `tables` has the constant rules.
"""
