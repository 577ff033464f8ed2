package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
)

// What FerretDB 1.24 with SQLite does otherwise than MongoDB, and the relay hides:
//
//   - A change of a document reads it, compares, and writes it in a transaction of its own, so two that expect the same document
//     both succeed. Commands that write go through one at a time.
//   - An update command holds a connection to SQLite for each of its statements until it ends, and waits for ever for the
//     hundredth. Its answer to hello says that a command may have 50 statements: drivers keep to it.
const maxWriteBatchSize = 50

const (
	headerSize = 16 // of a message: length, request, response to, op code, 32 bits each in little endian
	maxMessage = 48 << 20
	opMsg      = 2013
)

// relay accepts connections until the process ends.
func relay(ctx context.Context, front net.Listener, back string) {
	var writing sync.Mutex
	for {
		client, err := front.Accept()
		if err != nil {
			return
		}
		go serve(ctx, client, back, &writing)
	}
}

// serve hands on one command after the other; a driver has one a connection under way.
func serve(ctx context.Context, client net.Conn, back string, writing *sync.Mutex) {
	defer client.Close()
	server, err := new(net.Dialer).DialContext(ctx, "tcp", back)
	if err != nil {
		return
	}
	defer server.Close()
	for {
		msg, err := message(client)
		if err != nil || !exchange(client, server, msg, writing) {
			return
		}
	}
}

func exchange(client, server net.Conn, msg []byte, writing *sync.Mutex) bool {
	if writes(msg) {
		writing.Lock()
		defer writing.Unlock()
	}
	if _, err := server.Write(msg); err != nil {
		return false
	}
	for {
		answer, err := message(server)
		if err != nil {
			return false
		}
		// A 32-bit integer of this name (bsonspec.org).
		name := []byte("\x10maxWriteBatchSize\x00")
		if i := bytes.Index(answer, name); i >= 0 && len(answer) >= i+len(name)+4 {
			binary.LittleEndian.PutUint32(answer[i+len(name):], maxWriteBatchSize)
		}
		if _, err := client.Write(answer); err != nil {
			return false
		}
		if !more(answer) {
			return true
		}
	}
}

func message(from io.Reader) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(from, size[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(size[:])
	if n < headerSize || n > maxMessage {
		return nil, io.ErrUnexpectedEOF
	}
	msg := make([]byte, n)
	copy(msg, size[:])
	_, err := io.ReadFull(from, msg[len(size):])
	return msg, err
}

// writes reports whether the message's command changes documents: an OP_MSG whose first section is of kind 0, a document whose
// first member has the command's name.
func writes(msg []byte) bool {
	const name = headerSize + 4 + 1 + 4 + 1 // flags, kind, the document's length, the member's type
	if binary.LittleEndian.Uint32(msg[12:]) != opMsg || len(msg) < name || msg[headerSize+4] != 0 {
		return false
	}
	command, _, _ := bytes.Cut(msg[name:], []byte{0})
	switch string(command) {
	case "insert", "update", "delete", "findAndModify":
		return true
	}
	return false
}

// more reports whether the server sends another answer to the same command without being asked (OP_MSG, flag moreToCome).
func more(answer []byte) bool {
	return binary.LittleEndian.Uint32(answer[12:]) == opMsg && len(answer) >= headerSize+4 && answer[headerSize]&2 != 0
}
