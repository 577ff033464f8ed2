// Package simulation tests what holds whatever happens: parts of a hub in processes that crash, stand still and go on, over a network that
// loses, delays and doubles, on a store whose answers get lost, all in simulated time and from one seed. Directories, their clients, the
// bus, the membership and the MongoDB store are the real ones; simulated are what is below them, a NATS server, a MongoDB server and the
// feed, and who is above them: devices at gateways, applications and subscribers.
//
// It must not know how the parts do what they do: it looks at what they answered, what they handed on, and the log.
package simulation
