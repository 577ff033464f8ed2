/** Lists the devices, switches a light, and hears of it: node dist/example.js, with COAPHUB_SERVER and COAPHUB_TOKEN. */
import { Hub, HubError } from "./index.js";

const hub = new Hub(process.env["COAPHUB_SERVER"] ?? "http://127.0.0.1:8080", process.env["COAPHUB_TOKEN"] ?? "");

for await (const device of hub.list("/api/v1/devices", { query: { statusFilter: ["ONLINE"] } })) {
  console.log("device", device.name, device.metadata.twinSynchronization.state);
  const path = { deviceId: device.id, href: "light/1" };

  for await (const told of hub.watch({ eventFilter: ["RESOURCE_UPDATED"], deviceIdFilter: [device.id] })) {
    if (told.operationProcessed) {
      // It listens: everything that happens from now on is told.
      const { data } = await hub.api.PUT("/api/v1/devices/{deviceId}/resources/{href}", { params: { path }, body: { power: 42 } });
      console.log("answer", JSON.stringify(data));
      continue;
    }
    console.log("event", told.resourceUpdated?.status, JSON.stringify(told.resourceUpdated?.content));
    break;
  }

  const { data } = await hub.api.GET("/api/v1/devices/{deviceId}/resources/{href}", { params: { path, query: { onlyContent: true } } });
  console.log("content", JSON.stringify(data));
  try {
    await hub.api.GET("/api/v1/devices/{deviceId}/resources/{href}", { params: { path: { ...path, href: "none" } } });
  } catch (error) {
    if (error instanceof HubError) console.log("error", error.status, error.code);
  }
}
