// Package embednats runs a nats-server with JetStream inside the process, for
// the one-process form of Holdfast.
//
// # Directory
//
// The server owns one directory: a lock that a second instance cannot take, a
// VERSION that an older program refuses, and what nats-server keeps below
// jetstream. nats-server itself has no lock: two of them on one directory would
// both acknowledge the same sequence. What cannot be read is refused and left as
// it is.
//
// # Durability
//
// Messages are written when they are acknowledged and fsynced every
// SyncInterval. A power cut can lose what came in between, kill -9 loses
// nothing. Whoever cannot bear that keeps a journal of its own until the
// message has gone on, as the ingress does.
//
// # A full disk
//
// When the disk is full, or a write fails in another way, nats-server freezes
// the stream or switches JetStream off, answers no publish any more, and does
// not recover by itself, even when there is room again. [Server.Healthy] shows
// this, and [Server.Run] restarts the server in place until it is healthy:
// clients made with [Server.InProcess], and those on the listener, reconnect.
package embednats
