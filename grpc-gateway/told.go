package grpcgateway

import (
	"sync"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

// told is one message to a subscriber: an event, the answer to an operation, or that a subscription is over.
type told struct {
	sub, corr, token string
	event            eventElement                 // the zero value: none
	shared           bool                         // the event is of the feed: others are told it too
	processed        *pb.Event_OperationProcessed // nil: none
	canceled         bool
}

func (t *told) message() *pb.Event {
	m := &pb.Event{SubscriptionId: t.sub, CorrelationId: t.corr, ResumeToken: t.token}
	switch {
	case t.event.commit != nil:
		k := subscribables[t.event.kind()]
		k.set(m, t.event)
	case t.processed != nil:
		m.Type = &pb.Event_OperationProcessed_{OperationProcessed: t.processed}
	case t.canceled:
		m.Type = &pb.Event_SubscriptionCanceled_{SubscriptionCanceled: &pb.Event_SubscriptionCanceled{}}
	}
	return m
}

func (e eventElement) kind() eventKind { return kindOfEvent(&e.commit.Events[e.index]) }

// appendFrame appends the message as it goes out of the doors for JSON.
func (g *Gateway) appendFrame(b []byte, t *told, proto bool) ([]byte, error) {
	b = append(b, `{"result":`...)
	if proto {
		var err error
		if b, err = appendMessage(b, t.message()); err != nil {
			return nil, err
		}
		return append(b, '}'), nil
	}
	b = appendText(append(b, '{'), "subscriptionId", t.sub)
	b = appendText(b, "correlationId", toUTF8(t.corr))
	switch {
	case t.event.commit != nil:
		if b[len(b)-1] != '{' {
			b = append(b, ',')
		}
		b = g.encodings.append(b, t.event, t.shared)
	case t.processed != nil:
		b = append(appendName(b, "operationProcessed"), `{"errorStatus":{`...)
		status := t.processed.GetErrorStatus()
		b = appendEnum(b, "code", pb.Event_OperationProcessed_ErrorStatus_Code_name, int32(status.GetCode()))
		b = append(appendText(b, "message", status.GetMessage()), '}')
		if t.processed.GetLagged() {
			b = appendBool(b, "lagged", true)
		}
		b = append(b, '}')
	case t.canceled:
		b = append(appendName(b, "subscriptionCanceled"), "{}"...)
	}
	b = appendText(b, "resumeToken", t.token)
	return append(b, '}', '}'), nil
}

// encodings keeps events in the simple JSON form while many subscribers are told them, so that each is encoded once. It has
// two generations: what the older one has and nobody asks for goes when the younger one is full.
type encodings struct {
	mu           sync.Mutex
	young, older map[encodingKey][]byte // guarded by mu
	bytes        int                    // of young, guarded by mu
}

// encodingKey names an event: the readers of the feed share its commits.
type encodingKey struct {
	commit *hub.Commit
	index  int
}

// maxEncodings bounds a generation, in bytes. What it costs beside the bytes is in encodingCost, with the commit that an
// entry keeps from being freed.
const (
	maxEncodings = 2 << 20
	encodingCost = 512
)

func (c *encodings) append(b []byte, e eventElement, shared bool) []byte {
	key := encodingKey{e.commit, e.index}
	if shared {
		if known := c.get(key); known != nil {
			return append(b, known...)
		}
	}
	begin := len(b)
	k := subscribables[e.kind()]
	b = append(b, '"')
	b = append(b, k.member...)
	b = k.json(append(b, '"', ':'), e)
	if shared {
		c.put(key, b[begin:])
	}
	return b
}

func (c *encodings) get(k encodingKey) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b, ok := c.young[k]; ok {
		return b
	}
	return c.older[k]
}

func (c *encodings) put(k encodingKey, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if size := len(b) + encodingCost; c.bytes+size > maxEncodings || c.young == nil {
		c.young, c.older, c.bytes = map[encodingKey][]byte{}, c.young, 0
	}
	c.young[k] = append([]byte(nil), b...)
	c.bytes += len(b) + encodingCost
}
