// Package stream is how the services use NATS: the connection, streams and
// consumers as code, the loop that takes messages in batches and acknowledges
// them after their commit, the trimming of what is committed, and the words that
// release spool records.
//
// # Delivery
//
// Every message reaches the handler at least once, in batches, and is
// acknowledged only after the handler has committed it. Repeats come after a
// crash, a lost acknowledgement, a reconnect, and a commit that took longer than
// the consumer's AckWait in spite of the notes that it is in progress. Order is
// that of the stream as long as nothing is repeated.
//
// A stream sequence names a message only for the moment: after a power cut a
// server can have lost the last messages, and gives their sequences to new ones.
// So nothing here remembers a sequence, an acknowledgement is sent only on the
// connection that brought the message, and trimming reads stream and consumer
// together each time.
package stream
