"""Recordings of real kernels as commands that the model executes, and the same language alone.

A file is one experiment: a header that says what exists, then one operation a line with what the
kernel was seen to do. ``replay`` runs the operations on a machine built from the header and
compares every observed field; without observations the same files are programs for the model.

    command_file   the lines, read and checked
    frames         the header's physical pages, as frames of a PhysicalMemory
    objects        what can be mapped: devices and files and their fault handlers
    bench          one machine with its processes, objects and labels of mappings
    operations     the operations, one function each
    observe        what a step's observation would show of the model
    replay         running, and comparing with what was recorded
    picture        a state for people
"""
