package grpcgateway

import (
	"strconv"

	"github.com/coaphub/coaphub/hub"
)

// The simple JSON form is protobuf's JSON with contents inlined and without empty texts, nulls, objects and arrays; numbers
// and false stay, 64-bit integers are texts. It is written straight from hub's words: going through messages and generic
// maps costs more than the rest of a small read. These helpers write members of an object that b ends in.

func appendName(b []byte, name string) []byte {
	if b[len(b)-1] != '{' {
		b = append(b, ',')
	}
	b = append(b, '"')
	b = append(b, name...)
	return append(b, '"', ':')
}

func appendText(b []byte, name, v string) []byte {
	if v == "" {
		return b
	}
	return appendString(appendName(b, name), v)
}

func appendTexts[S ~string](b []byte, name string, vs []S) []byte {
	if len(vs) == 0 {
		return b
	}
	b = append(appendName(b, name), '[')
	for i, v := range vs {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(b, string(v))
	}
	return append(b, ']')
}

func appendInt(b []byte, name string, v int64) []byte {
	b = append(appendName(b, name), '"')
	return append(strconv.AppendInt(b, v, 10), '"')
}

func appendUint(b []byte, name string, v uint64) []byte {
	b = append(appendName(b, name), '"')
	return append(strconv.AppendUint(b, v, 10), '"')
}

func appendBool(b []byte, name string, v bool) []byte {
	return strconv.AppendBool(appendName(b, name), v)
}

func appendBytes(b []byte, name string, v []byte) []byte {
	if len(v) == 0 {
		return b
	}
	return appendBase64(appendName(b, name), v)
}

func appendEnum(b []byte, name string, names map[int32]string, v int32) []byte {
	b = appendName(b, name)
	if s, ok := names[v]; ok {
		b = append(append(b, '"'), s...)
		return append(b, '"')
	}
	return strconv.AppendInt(b, int64(v), 10)
}

// appendCause appends who and what brought the last event of an aggregate.
func appendCause(b []byte, c hub.Cause, hubID string) []byte {
	if c.Owner != "" || c.User != "" || c.Correlation != "" {
		b = append(appendName(b, "auditContext"), '{')
		b = appendText(b, "userId", c.User)
		b = appendText(b, "correlationId", c.Correlation)
		b = append(appendText(b, "owner", string(c.Owner)), '}')
	}
	if !c.Known {
		return b
	}
	b = append(appendName(b, "eventMetadata"), '{')
	b = appendUint(b, "version", c.Version)
	b = appendInt(b, "timestamp", c.Time)
	b = appendText(b, "connectionId", c.Connection)
	b = appendUint(b, "sequence", c.Message)
	return append(appendText(b, "hubId", hubID), '}')
}
