"""The kernel over netlink: nf_tables, conntrack, addresses, sysctls."""
