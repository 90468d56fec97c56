"""nf_tables over netlink, as bytes: attributes, messages, rules and elements, and back."""
